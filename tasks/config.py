"""The tasks of a run: what a ``trainer_config/<name>.json`` (or YAML) says, checked and resolved.

LobRA's own files load unchanged. Everything that is wrong with a file is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lobra.common.checks import (
    Check,
    boolean,
    integer,
    number,
    one_of,
    safe_name,
    show,
    text,
    text_or_texts,
)
from lobra.common.documents import read_document
from lobra.common.errors import ConfigError, Problems, did_you_mean
from lobra.tasks.foreign_names import foreign_field
from lobra.tasks.prompts import template_problem

CONFIG_FOLDER = Path("trainer_config")
#: The same of the installation: the task sets that come with the project.
SHIPPED_FOLDER = Path(__file__).parent.with_name("trainer_config")
SUFFIXES = (".json", ".yaml", ".yml")
VARIANTS = ("canonical", "fused")
LR_SCHEDULERS = ("constant", "linear", "cosine")

#: The linear projections of a Llama layer, in the order adapters are listed.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Names of other systems for one or several of them: LobRA's are Megatron's, PEFT's `all-linear`.
MODULE_ALIASES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_proj", "up_proj"),
    "dense_4h_to_h": ("down_proj",),
    "all-linear": TARGET_MODULES,
}


@dataclass(frozen=True)
class TaskConfig:
    """One tenant's fine-tuning job.

    Attributes
    ----------
    name
        Unique in its file, usable as a folder's name. Default: from ``dataset_name``.
    rank, lora_alpha, target_modules, lora_dropout
        The adapter; ``target_modules`` in Hugging Face's names, in the order of `TARGET_MODULES`.
    global_batch_size
        Sequences of this task in every step.
    dataset_name
        A file ``<data-dir>/<dataset_name>.jsonl``, a path, a hub name, or an embedded task; several
        of them for their rows one after another.
    context_length
        Most tokens of a sequence; longer ones are cut.
    json_key
        The field that holds the text of a row, for data without instructions.
    max_samples
        At most this many rows of each of its data sets, the first ones.
    steps, epochs
        The task runs for ``steps`` steps if given, otherwise for ``epochs`` passes over its data.
    learning_rate, weight_decay, lr_scheduler, warmup_steps, max_grad_norm
        AdamW and its schedule; ``max_grad_norm`` 0 means no clipping.
    seed
        Seed of the task's adapter initialisation and of its order of sequences.
    prompt
        ``auto`` (by the data's fields), ``alpaca``, ``chat``, ``plain``, or a custom template.
    train_on_inputs
        Learn the prompt's tokens too.
    validation_split
        Share of the sequences held out from training, in [0, 1).
    early_stopping_patience, early_stopping_min_delta
        End the task after this many evaluation periods in a row without its loss (the validation
        loss where there is one) falling by more than ``min_delta``; 0 never does.
    resume_from
        PEFT adapter folder to start from.
    """

    name: str
    rank: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    global_batch_size: int
    dataset_name: str | tuple[str, ...]
    context_length: int
    json_key: str = "text"
    max_samples: int | None = None
    steps: int | None = None
    epochs: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    lr_scheduler: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    lora_dropout: float = 0.0
    seed: int = 0
    prompt: str = "auto"
    train_on_inputs: bool = False
    validation_split: float = 0.0
    early_stopping_patience: int = 0
    early_stopping_min_delta: float = 0.0
    resume_from: str | None = None

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The names of its data sets: one, or several in order."""
        return (self.dataset_name,) if isinstance(self.dataset_name, str) else self.dataset_name


@dataclass(frozen=True)
class TrainerConfig:
    """The tasks of one run, and the file they came from.

    ``variant`` is LobRA's: whether its query, key and value projections were one module
    (``fused``) or three (``canonical``). Here both mean the same three.
    """

    name: str
    variant: str
    tasks: tuple[TaskConfig, ...]
    path: Path


def clip_context(tasks: Sequence[TaskConfig], max_seq_length: int | None) -> tuple[TaskConfig, ...]:
    """Return the tasks with ``context_length`` no longer than ``max_seq_length``."""
    if max_seq_length is None:
        return tuple(tasks)
    return tuple(
        replace(task, context_length=min(task.context_length, max_seq_length)) for task in tasks
    )


def load_trainer_config(
    name_or_path: str | os.PathLike[str], num_tasks: int | None = None
) -> TrainerConfig:
    """Return the trainer configuration of a name (``trainer_config/<name>.json``) or of a path.

    Parameters
    ----------
    name_or_path
        A path of a JSON or YAML file, or a name looked up in ``trainer_config/`` of the working
        folder and then among the task sets that are installed with the project.
    num_tasks
        Use the first ``num_tasks`` tasks, whatever ``train_task_num`` says.

    Raises
    ------
    ConfigError
        Naming every mistake of the file: its field, its value and what would be right.
    """
    path = _find_config(name_or_path)
    document = read_document(path)
    problems = Problems()
    config = _read_config(document, path, num_tasks, problems)
    problems.prefixed(f"{path}: ").raise_if_any()
    return config


def resolve_target_modules(names: Sequence[str]) -> tuple[str, ...]:
    """Return the Hugging Face names of target modules, each once, in the order of the layer.

    Raises
    ------
    ValueError
        For a name that is neither in `TARGET_MODULES` nor in `MODULE_ALIASES`.
    """
    chosen: set[str] = set()
    for name in names:
        if name in TARGET_MODULES:
            chosen.add(name)
        elif name in MODULE_ALIASES:
            chosen.update(MODULE_ALIASES[name])
        else:
            raise ValueError(f"unknown target module {name!r}")
    return tuple(name for name in TARGET_MODULES if name in chosen)


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


_TASK_FIELDS = tuple(field.name for field in fields(TaskConfig))
_REQUIRED = (
    "rank",
    "lora_alpha",
    "target_modules",
    "global_batch_size",
    "dataset_name",
    "context_length",
)
_TOP_FIELDS = ("variant", "train_task_num", "task")

_CHECKS: Mapping[str, Check] = {
    "name": safe_name,
    "rank": integer(1),
    "lora_alpha": number(lambda x: x > 0, "a positive number"),
    "global_batch_size": integer(1),
    "dataset_name": text_or_texts,
    "context_length": integer(1),
    "json_key": text,
    "max_samples": integer(1),
    "steps": integer(1),
    "epochs": integer(1),
    "learning_rate": number(lambda x: x > 0, "a positive number"),
    "weight_decay": number(lambda x: x >= 0, "a number of 0 or more"),
    "lr_scheduler": one_of(LR_SCHEDULERS),
    "warmup_steps": integer(0),
    "max_grad_norm": number(lambda x: x >= 0, "a number of 0 or more (0: no clipping)"),
    "lora_dropout": number(lambda x: 0 <= x < 1, "a number from 0 to below 1"),
    "seed": integer(0),
    "train_on_inputs": boolean,
    "validation_split": number(lambda x: 0 <= x < 1, "a number from 0 to below 1"),
    "early_stopping_patience": integer(0),
    "early_stopping_min_delta": number(lambda x: x >= 0, "a number of 0 or more"),
    "resume_from": text,
}


def _read_config(
    document: Any, path: Path, num_tasks: int | None, problems: Problems
) -> TrainerConfig:
    if not isinstance(document, dict):
        problems.add(
            f"holds {show(document)}, want an object with the fields {', '.join(_TOP_FIELDS)}"
        )
        return TrainerConfig(path.stem, VARIANTS[0], (), path)
    _report_unknown_top(document, problems)
    variant = document.get("variant", VARIANTS[0])
    _report(one_of(VARIANTS)(variant), "variant", variant, problems)

    entries = document.get("task")
    if entries is None:
        problems.add("task: is missing, want a list of tasks")
    elif not isinstance(entries, list) or not entries:
        problems.add(f"task = {show(entries)}: want a list of at least one task")
    entries = entries if isinstance(entries, list) else []
    tasks = [_read_task(entry, f"task[{index}]", problems) for index, entry in enumerate(entries)]
    _report_unknown(entries, problems)
    count = _count_tasks(document, len(entries), num_tasks, problems)
    named = _name_tasks(tasks, problems)
    return TrainerConfig(path.stem, cast(str, variant), named[:count], path)


def _count_tasks(
    document: Mapping[str, Any], available: int, num_tasks: int | None, problems: Problems
) -> int:
    """Return how many of the listed tasks to use, and report when there are not that many."""
    given = document.get("train_task_num", available)
    wanted = integer(1)(given)
    if "train_task_num" in document:
        _report(wanted, "train_task_num", given, problems)
        if wanted is None and given > available > 0:
            problems.add(
                f"train_task_num = {given}: but `task` lists only {available}: "
                f"want at most {available}, or {given - available} more tasks"
            )
    if num_tasks is None:
        return available if wanted else int(given)
    if num_tasks < 1:
        problems.add(f"{num_tasks} tasks were asked for, want at least 1")
    elif num_tasks > available > 0:
        problems.add(
            f"{num_tasks} tasks were asked for, but `task` lists only {available}: "
            f"ask for at most {available}"
        )
    return num_tasks


def _read_task(entry: Any, where: str, problems: Problems) -> dict[str, Any]:
    """Return the valid fields of one entry of ``task``; report everything else."""
    if not isinstance(entry, dict):
        problems.add(f"{where} = {show(entry)}: want an object with the fields of a task")
        return {}
    misnamed = {found[0] for key in entry if (found := foreign_field(str(key)))}
    for field in _REQUIRED:
        if entry.get(field) is None and field not in misnamed:
            problems.add(f"{where}.{field}: is missing, want {_wanted(field)}")
    # null means "not given", which is how YAML and LobRA's tools leave a field open.
    given = {key: value for key, value in entry.items() if value is not None}
    if not {"steps", "epochs"} & (given.keys() | misnamed):
        problems.add(f"{where}: has neither steps nor epochs, want at least one of them")

    good: dict[str, Any] = {}
    for field, check in _CHECKS.items():
        if field in given:
            wanted = check(given[field])
            _report(wanted, f"{where}.{field}", given[field], problems)
            if wanted is None:
                good[field] = given[field]
    if isinstance(good.get("dataset_name"), list):
        names = tuple(good["dataset_name"])
        good["dataset_name"] = names[0] if len(names) == 1 else names
    if "target_modules" in given:
        modules = _read_modules(given["target_modules"], f"{where}.target_modules", problems)
        if modules:
            good["target_modules"] = modules
    if "prompt" in given:
        good["prompt"] = _read_prompt(given["prompt"], f"{where}.prompt", problems)
    if {"steps", "warmup_steps"} <= good.keys() and good["warmup_steps"] > good["steps"]:
        problems.add(
            f"{where}.warmup_steps = {good['warmup_steps']}: "
            f"want at most the task's steps, {good['steps']}"
        )
    return good


def _read_modules(value: Any, where: str, problems: Problems) -> tuple[str, ...]:
    known = (*TARGET_MODULES, *MODULE_ALIASES)
    if isinstance(value, str) and value in known:
        value = [value]
    if not isinstance(value, list) or not value:
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        hint = " (did you mean 'all-linear'?)" if value == "all" else hint
        problems.add(f"{where} = {show(value)}: want a list of {', '.join(known)}{hint}")
        return ()
    good = []
    for index, module in enumerate(value):
        if isinstance(module, str) and module in known:
            good.append(module)
            continue
        hint = did_you_mean(module, known) if isinstance(module, str) else ""
        problems.add(f"{where}[{index}] = {show(module)}: want one of {', '.join(known)}{hint}")
    return resolve_target_modules(good)


def _read_prompt(value: Any, where: str, problems: Problems) -> str:
    problem = template_problem(value) if isinstance(value, str) else "is no text"
    if problem:
        problems.add(f"{where} = {show(value)}: {problem}")
        return "auto"
    return cast(str, value)


def _wanted(field: str) -> str:
    if field == "target_modules":
        return f"a list of {', '.join((*TARGET_MODULES, *MODULE_ALIASES))}"
    return _CHECKS[field](None) or "a value"


def _report(wanted: str | None, where: str, value: Any, problems: Problems) -> None:
    if wanted:
        problems.add(f"{where} = {show(value)}: want {wanted}")


def _report_unknown(entries: Sequence[Any], problems: Problems) -> None:
    """Report the fields of tasks that are none; all there are are listed once, not for each."""
    listed = False
    for index, entry in enumerate(entries):
        for key in entry if isinstance(entry, dict) else ():
            if key in _TASK_FIELDS:
                continue
            hint = _unknown_hint(str(key), _TASK_FIELDS)
            if not hint and not listed:
                hint, listed = f": a task has {', '.join(_TASK_FIELDS)}", True
            problems.add(f"task[{index}].{key}: is no field here{hint}")


def _report_unknown_top(document: Mapping[Any, Any], problems: Problems) -> None:
    for key in document:
        if key in _TOP_FIELDS:
            continue
        hint = f": the file has {', '.join(_TOP_FIELDS)}{did_you_mean(str(key), _TOP_FIELDS)}"
        if key in _TASK_FIELDS:
            hint = ": it belongs into the entries of `task`"
        elif foreign := foreign_field(str(key)):
            hint = f": {foreign[1]}" + (", in the entries of `task`" if foreign[0] else "")
        problems.add(f"{key}: is no field here{hint}")


def _unknown_hint(key: str, known: Sequence[str]) -> str:
    """Return what a field that is none may have been meant to be, "" where nothing comes near."""
    foreign = foreign_field(key)
    return f": {foreign[1]}" if foreign else did_you_mean(key, known)


def _name_tasks(tasks: Sequence[dict[str, Any]], problems: Problems) -> tuple[TaskConfig, ...]:
    """Return the tasks with their names: the given ones, unique; the others made unique.

    Names are compared without case, since they become folders. Incomplete tasks are left out;
    their problems are reported already.
    """
    owners: dict[str, int] = {}
    for index, task in enumerate(tasks):
        if "name" not in task:
            continue
        key = task["name"].casefold()
        if key in owners:
            problems.add(
                f"task[{index}].name = {show(task['name'])}: task[{owners[key]}] has this name "
                "already, want a name of its own (upper and lower case count as equal)"
            )
        owners.setdefault(key, index)

    named = []
    for index, task in enumerate(tasks):
        if any(field not in task for field in _REQUIRED):
            continue
        name = task.get("name")
        if name is None:
            first = task["dataset_name"]
            stem = _name_of(first if isinstance(first, str) else first[0])
            name, number = stem, 1
            while name.casefold() in owners:
                number += 1
                name = f"{stem}_{number}"
            owners[name.casefold()] = index
        named.append(TaskConfig(**{**task, "name": name}))
    return tuple(named)


def _name_of(dataset_name: str) -> str:
    """Return a data set's name without folders and suffix, safe as the name of a folder."""
    name = PurePosixPath(dataset_name.replace("\\", "/")).name
    name = re.sub(r"\.jsonl?$", "", name)
    name = re.sub(r"[^A-Za-z0-9._+-]+", "_", name).lstrip(".+-")[:90]
    return name or "task"
