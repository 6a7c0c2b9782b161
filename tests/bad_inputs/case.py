"""A bad input: what of a good set-up is changed, and what the refusal says."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.assets.golden import HERE as GOLDEN

FORMATS = GOLDEN.parent / "formats"
TASKS = json.loads((FORMATS / "tasks.json").read_text())

_SET_UP = ("--model", "base", "--trainer-config", "tasks.json", "--strategy-config")
COMMANDS = {
    "train": ("train", *_SET_UP, "plan.yaml", "--output-dir", "new", "--device", "cpu"),
    "resume": ("train", *_SET_UP, "plan.yaml", "--output-dir", "run", "--device", "cpu",
               "--resume"),
    "plan": ("plan", *_SET_UP, "new.yaml", "--num-gpus", "3", "--max-seq-length", "256",
             "--lengths", "lengths.json"),
    "simulate": ("simulate", *_SET_UP, "plan.yaml", "--lengths", "lengths.json"),
    "report": ("report", "run"),
    "report-folder": ("report",),
    "doctor": ("doctor", "--strategy-config", "plan.yaml"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes
    ----------
    says
        Parts of the message: where the mistake is, and what to do or what is wanted instead.
    files
        What is written over the set-up: text, bytes, or values as JSON; None: a pipe.
    options
        Added to the command's.
    command
        A key of `COMMANDS`.
    """

    says: tuple[str, ...]
    files: Mapping[str, Any] | None = None
    options: tuple[str, ...] = ()
    command: str = "train"

    @property
    def words(self) -> tuple[str, ...]:
        """The command line."""
        return (*COMMANDS[self.command], *self.options)

    def write(self) -> None:
        """Break the set-up in the working folder."""
        for name, content in (self.files or {}).items():
            path = Path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if content is None:
                os.mkfifo(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))


def task_file(**changes: Any) -> dict[str, Any]:
    """Return the task file with changes to its second task, ``few``; ``...`` removes a field."""
    entry = {**TASKS["task"][1], **changes}
    entry = {name: value for name, value in entry.items() if value is not ...}
    return {**TASKS, "task": [TASKS["task"][0], entry]}
