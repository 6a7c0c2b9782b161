"""Requests to change the tasks of a run while it trains: files in its folder, each answered by one.

A request is written by whoever sees the folder, on any host; the run's coordinator looks for them
between steps. What was accepted is known by its answer, which is on disk before it has an effect:
a run that is killed, and goes on from a checkpoint before it, makes the change again at its step.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lobra.common.documents import check_regular, parse_json
from lobra.common.errors import ConfigError, Problems
from lobra.common.files import write_atomic
from lobra.common.models import Count, FileModel, Flag, Text, load_as, read_as

FOLDER = "task_requests"  # in a run's
REQUEST, ANSWER = ".request.json", ".answer.json"
LOOK_S = 0.2  # between looks for an answer


@dataclass(frozen=True)
class TaskRequest(FileModel):
    """What is asked for.

    Attributes
    ----------
    name
        The task's.
    task
        Its fields, of a task that is to join; None: the task is to leave.
    """

    name: Text
    task: dict[str, Any] | None = None


@dataclass(frozen=True)
class TaskAnswer(FileModel):
    """What became of a request.

    Attributes
    ----------
    accepted
        Whether the run's tasks are changed.
    text
        Why not, or what a person should know.
    step
        After how many steps of the run.
    request
        What was asked for.
    """

    accepted: Flag
    text: str
    step: Count
    request: TaskRequest


@dataclass(frozen=True)
class TaskChange(FileModel):
    """A change of a run's tasks that was accepted.

    Attributes
    ----------
    id
        Of the request.
    step
        After how many steps of the run it has its effect.
    request
        What was asked for.
    """

    id: Text
    step: Count
    request: TaskRequest


def send(run: Path, request: TaskRequest) -> str:
    """Ask a run, known by its folder, to change its tasks; return the request's id.

    Ids of later requests are greater.
    """
    name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
    write_atomic(run / FOLDER / f"{name}{REQUEST}", json.dumps(asdict(request)) + "\n")
    return name


def withdraw(run: Path, name: str) -> None:
    """Ask for it no more."""
    (run / FOLDER / f"{name}{REQUEST}").unlink(missing_ok=True)


def answer_to(run: Path, name: str, until: float) -> TaskAnswer | None:
    """Return the answer to a request; None if there is none in time: then it is withdrawn.

    ``until`` is a time of the monotonic clock.
    """
    path = run / FOLDER / f"{name}{ANSWER}"
    while not path.is_file():
        if time.monotonic() > until:
            withdraw(run, name)
            if not path.is_file():
                return None
        time.sleep(LOOK_S)
    return load_as(TaskAnswer, path)


def waiting(run: Path) -> dict[str, TaskRequest]:
    """Return the requests of a run that have no answer, by id, the oldest first.

    Files that are no requests are left alone.
    """
    found = {}
    for path in sorted((run / FOLDER).glob(f"*{REQUEST}")):
        name = path.name.removesuffix(REQUEST)
        if (run / FOLDER / f"{name}{ANSWER}").exists():
            path.unlink(missing_ok=True)  # the run was killed when it had answered
        elif request := _request_in(path):
            found[name] = request
    return found


def _request_in(path: Path) -> TaskRequest | None:
    try:
        check_regular(path)
        return read_as(TaskRequest, parse_json(path.read_text(encoding="utf-8")), Problems())
    except (ConfigError, OSError, ValueError):
        return None


def answer(run: Path, name: str, given: TaskAnswer) -> None:
    """Answer a request."""
    write_atomic(run / FOLDER / f"{name}{ANSWER}", json.dumps(asdict(given)) + "\n")
    (run / FOLDER / f"{name}{REQUEST}").unlink(missing_ok=True)


def accepted_changes(run: Path) -> list[TaskChange]:
    """Return the changes that a run has accepted, in order."""
    found = []
    for path in sorted((run / FOLDER).glob(f"*{ANSWER}")):
        given = load_as(TaskAnswer, path)
        if given.accepted:
            found.append(TaskChange(path.name.removesuffix(ANSWER), given.step, given.request))
    return sorted(found, key=lambda change: (change.step, change.id))


def left_by(changes: list[TaskChange]) -> Mapping[str, int]:
    """Return the tasks that left by these changes, and after which step of the run."""
    return {change.request.name: change.step for change in changes if change.request.task is None}
