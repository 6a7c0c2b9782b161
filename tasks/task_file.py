"""Task files: what a ``trainer_config/<name>.json`` (or YAML) says, found, checked and resolved.

LobRA's own files load unchanged. Everything that is wrong with a file is reported at once.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError, Problems, did_you_mean
from lobra.common.models import FileModel, Mistake, OneOf, PositiveInt, read_as
from lobra.tasks.config import TaskConfig
from lobra.tasks.foreign_names import foreign_field

log = logging.getLogger(__name__)

CONFIG_FOLDER = Path("trainer_config")
#: The same of the installation: the task sets that come with the project.
SHIPPED_FOLDER = Path(__file__).parent.with_name("trainer_config")
SUFFIXES = (".json", ".yaml", ".yml")
VARIANTS = ("canonical", "fused")
MOST_TASKS = 3000  # that a run's config.yaml has room for (`common.yaml_text.MOST_NODES`)


def _named(entries: Any) -> Any:
    """Return the entries of `task` with their names: the given ones, the others made unique.

    Names are compared without case, since they become folders.
    """
    if not isinstance(entries, list):
        return entries
    named = [dict(entry) if isinstance(entry, dict) else {} for entry in entries]
    owners: dict[str, int] = {}
    for index, entry in enumerate(named):
        if isinstance(name := entry.get("name"), str):
            owner = owners.setdefault(name.casefold(), index)
            if owner != index:
                entry["name"] = Mistake(
                    f"task[{owner}] has this name already, want a name of its own (upper and lower "
                    "case count as equal)",
                    name,
                )
    taken = set(owners)
    for entry in named:
        if entry.get("name") is None:
            stem = _name_of(entry.get("dataset_name"))
            names = chain([stem], (f"{stem}_{number}" for number in count(2)))
            entry["name"] = next(name for name in names if name.casefold() not in taken)
            taken.add(entry["name"].casefold())
    pairs = zip(entries, named, strict=True)
    return [new if isinstance(entry, dict) else entry for entry, new in pairs]


def _name_of(dataset_name: Any) -> str:
    """Return a data set's name without folders and suffix, safe as the name of a folder."""
    if isinstance(dataset_name, list) and dataset_name:
        dataset_name = dataset_name[0]
    if not isinstance(dataset_name, str):
        return "task"
    name = PurePosixPath(dataset_name.replace("\\", "/")).name
    name = re.sub(r"\.jsonl?$", "", name)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip(".+-")[:90]
    return name or "task"


@dataclass(frozen=True)
class TaskFile(FileModel):
    """Tasks for one base model, trained together."""

    task: Annotated[list[TaskConfig], Field(min_length=1), BeforeValidator(_named)]
    """The tasks, one adapter each."""
    train_task_num: PositiveInt | None = None
    """Only the first so many of the tasks."""
    variant: Annotated[str, OneOf(VARIANTS)] = VARIANTS[0]
    """LobRA's files have it; both mean the same here."""

    @classmethod
    def stranger(cls, name: str) -> tuple[str | None, str]:
        """Return what a field that is none was meant to be, if it is known, and what to say."""
        ours, hint = foreign_field(name) or (None, "")
        if name in _TASK_FIELDS:
            return None, ": it belongs into the entries of `task`"
        if hint:
            return None, f": {hint}" + (", in the entries of `task`" if ours else "")
        return super().stranger(name)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Mapping[str, Mistake]:
        """Return what is wrong with the number of tasks."""
        wanted_tasks, entries = given.get("train_task_num"), given.get("task")
        if not isinstance(entries, list):
            return {}
        if len(entries) > MOST_TASKS:
            text = f"lists {len(entries)} tasks, want at most {MOST_TASKS} in a run"
            return {"task": Mistake(text)}
        if not isinstance(wanted_tasks, int):
            return {}
        missing = wanted_tasks - len(entries)
        if missing <= 0 or not entries:
            return {}
        text = f"`task` lists only {len(entries)}: want at most so many, or {missing} more tasks"
        return {"train_task_num": Mistake(text, wanted_tasks)}


_TASK_FIELDS = tuple(field.name for field in fields(TaskConfig))


@dataclass(frozen=True)
class TrainerConfig:
    """The tasks of one run, and the file they came from.

    ``variant`` is LobRA's: whether its query, key and value projections were one module
    (``fused``) or three (``canonical``). Here both mean the same three. ``numbers`` are the tasks'
    places in the file, from 0; where bad ones were left out, not all are there.
    """

    name: str
    variant: str
    tasks: tuple[TaskConfig, ...]
    path: Path
    numbers: tuple[int, ...] = ()


def clip_context(tasks: Sequence[TaskConfig], max_seq_length: int | None) -> tuple[TaskConfig, ...]:
    """Return the tasks with ``context_length`` no longer than ``max_seq_length``."""
    if max_seq_length is None:
        return tuple(tasks)
    return tuple(
        replace(task, context_length=min(task.context_length, max_seq_length)) for task in tasks
    )


def load_trainer_config(
    name_or_path: str | os.PathLike[str],
    num_tasks: int | None = None,
    left_out: Problems | None = None,
    whole_models: bool = False,
) -> TrainerConfig:
    """Return the trainer configuration of a name (``trainer_config/<name>.json``) or of a path.

    Parameters
    ----------
    name_or_path
        A path of a JSON or YAML file, or a name looked up in ``trainer_config/`` of the working
        folder and then among the task sets that are installed with the project.
    num_tasks
        Use the first ``num_tasks`` tasks, whatever ``train_task_num`` says.
    left_out
        If it is given, tasks with mistakes are left out, and it gets these.
    whole_models
        Whether tasks may train the model itself; profiles and plans are of adapters only.

    Raises
    ------
    ConfigError
        Naming every mistake of the file: its field, its value and what would be right.
    """
    path = _find_config(name_or_path)
    document = read_document(path)
    problems = Problems()
    numbers: Sequence[int] = ()
    if left_out is not None:
        document, numbers = _without_bad_tasks(document, path, num_tasks, left_out)
        num_tasks = None if numbers else num_tasks
    file = read_as(TaskFile, document, problems)
    entries = document.get("task") if isinstance(document, dict) else None
    listed = len(entries) if isinstance(entries, list) else 0
    if num_tasks is not None and num_tasks < 1:
        problems.add(f"{num_tasks} tasks were asked for, want at least 1")
    elif num_tasks is not None and num_tasks > listed > 0:
        problems.add(
            f"{num_tasks} tasks were asked for, but `task` lists only {listed}: "
            f"ask for at most {listed}"
        )
    if file is not None and not whole_models:
        problems += [
            f"task[{number}].adapter = full: profiles and plans are made for adapters only: write "
            f"the plan of one layout by hand and give both to lobra train"
            for number, task in enumerate(file.task)
            if task.trains_model
        ]
    problems.prefixed(f"{path}: ").raise_if_any()
    assert file is not None
    tasks = tuple(file.task[: num_tasks or file.train_task_num])
    for task in tasks:
        if task.steps is not None and task.epochs != TaskConfig.epochs:
            log.warning(
                "%s: task %s: its %d steps count, its %d epochs do not",
                path, task.name, task.steps, task.epochs,
            )  # fmt: skip
    return TrainerConfig(path.stem, file.variant, tasks, path, tuple(numbers or range(len(tasks))))


def _without_bad_tasks(
    document: Any, path: Path, num_tasks: int | None, left_out: Problems
) -> tuple[Any, list[int]]:
    """Return a task file's content without tasks that have mistakes, and the others' places."""
    entries = document.get("task") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        return document, []
    asked = num_tasks or document.get("train_task_num") or len(entries)
    if type(asked) is not int or not 0 < asked <= len(entries):
        return document, []  # a mistake of the file's own
    named = _named(entries[:asked])
    found = Problems()
    good = []
    for number, entry in enumerate(named):
        own = Problems()
        read_as(TaskFile, {"task": [entry]}, own)
        place = f"{path}: task[{number}]"
        found += own.changed(lambda text, place=place: place + text.removeprefix("task[0]"))  # type: ignore[misc]
        if not own:
            good.append(number)
    if not good:
        return document, []  # all of them are told as without leaving out
    left_out += found
    kept = {**document, "task": [named[number] for number in good]}
    return {name: value for name, value in kept.items() if name != "train_task_num"}, good


def _find_config(name_or_path: str | os.PathLike[str]) -> Path:
    given = Path(name_or_path)
    tried = [given, *_candidates(CONFIG_FOLDER, given)]
    for path in (*tried, *_candidates(SHIPPED_FOLDER, given)):
        if os.path.isfile(path):  # False, not an error, for names no file can have
            return path
    own, shipped = _names_in(CONFIG_FOLDER), _names_in(SHIPPED_FOLDER)
    raise ConfigError(
        f"no trainer configuration {os.fspath(name_or_path)!r}"
        f"{did_you_mean(given.stem, sorted({*own, *shipped}))}: "
        f"looked for {', '.join(str(path) for path in tried)}; "
        + (f"{CONFIG_FOLDER}/ has {', '.join(own)}" if own else f"{CONFIG_FOLDER}/ has none")
        + (f"; LobRA brings {', '.join(shipped)}" if shipped and shipped != own else "")
        + "; `lobra init` writes one to start from"
    )


def _candidates(folder: Path, given: Path) -> list[Path]:
    """Return the files of a folder that a name, with its suffix or without, may mean."""
    if given.suffix in SUFFIXES:
        return [folder / given]
    return [folder / f"{given}{suffix}" for suffix in SUFFIXES]


def _names_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*") if path.suffix in SUFFIXES)
