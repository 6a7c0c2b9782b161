"""The tasks of a run: what a ``trainer_config/<name>.json`` (or YAML) says, checked and resolved.

LobRA's own files load unchanged. Everything that is wrong with a file is reported at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError, Problems, did_you_mean
from lobra.common.models import (
    AtMost,
    Count,
    FileModel,
    Flag,
    FolderName,
    Mistake,
    NotNegative,
    NumTokens,
    OneOf,
    Positive,
    PositiveInt,
    Rank,
    Share,
    Text,
    Wanted,
    read_as,
    wanted,
)
from lobra.tasks.foreign_names import foreign_field
from lobra.tasks.objectives import KTO, OBJECTIVES, PARAMETERS, PPO, SUPERVISED
from lobra.tasks.patterns import pattern_problem
from lobra.tasks.prompts import NAMES, template_problem
from lobra.tasks.target_modules import (
    ADAPTED_MODULES,
    EMBEDDING,
    MODULE_ALIASES,
    TARGET_MODULES,
    resolve_target_modules,
)

CONFIG_FOLDER = Path("trainer_config")
#: The same of the installation: the task sets that come with the project.
SHIPPED_FOLDER = Path(__file__).parent.with_name("trainer_config")
SUFFIXES = (".json", ".yaml", ".yml")
VARIANTS = ("canonical", "fused")
ADAPTERS = ("lora", "rslora", "pissa", "dora", "vera")
FULL = "full"  # no adapter: the base's own weights
#: What only adapters have, with values that mean nothing where there is none.
_OF_ADAPTERS: Mapping[str, Any] = {
    **dict(rank=1, lora_alpha=1, target_modules=list(TARGET_MODULES), lora_dropout=0.0),
    **dict(loraplus_ratio=1.0, rank_pattern={}, alpha_pattern={}, projection_prng_key=0),
    **dict(modules_to_save=(), bias="none", resume_from=None),
}
BIASES = ("none", "all", "lora_only")
ADAMW_8BIT = "adamw8bit"
OPTIMIZERS = ("adamw", ADAMW_8BIT, "sgd")
_ADAMS = ("adamw", ADAMW_8BIT)
_OF_OPTIMIZER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _ADAMS),
    "momentum": ("sgd",),
}
LR_SCHEDULERS = ("constant", "linear", "cosine")

_MODULES = (*ADAPTED_MODULES, *MODULE_ALIASES)


def _listed(value: Any) -> list[Any]:
    """Return the names of modules as a list, where one is given without."""
    if isinstance(value, str) and value in _MODULES:
        return [value]
    if not isinstance(value, list) or not value:
        raise wanted(f"a list of {', '.join(_MODULES)}", _MODULES)
    return value


def _one_or_more(value: Any) -> Any:
    """Return one text as a list, anything else as it is."""
    return [value] if isinstance(value, str) else value


def _checked_prompt(value: str) -> str:
    if problem := template_problem(value):
        raise PydanticCustomError("template", problem)  # type: ignore[arg-type]
    return value


_Module = Annotated[str, OneOf(_MODULES)]
_Several = Annotated[list[_Module], Field(min_length=1)]
_Modules = Annotated[
    tuple[_Module, ...],
    BeforeValidator(_listed, json_schema_input_type=_Module | _Several),
    AfterValidator(resolve_target_modules),
]
_Names = Annotated[
    Text | Annotated[tuple[Text, ...], Field(min_length=1)],
    AfterValidator(lambda names: names if isinstance(names, str) or names[1:] else names[0]),
    Wanted("a text that is not empty, or a list of such texts"),
]
_Prompt = Annotated[
    str,
    Field(strict=True, examples=list(NAMES)),
    Wanted("a text"),
    AfterValidator(_checked_prompt),
]
_Norms = Annotated[
    tuple[Text, ...], BeforeValidator(_one_or_more, json_schema_input_type=Text | list[Text])
]
_Scheduler = Annotated[str, OneOf(LR_SCHEDULERS)]
_Adapter = Annotated[str, OneOf((*ADAPTERS, FULL))]
_Optimizer = Annotated[str, OneOf(OPTIMIZERS)]


def _checked_patterns(patterns: dict[str, Any]) -> dict[str, Any]:
    for pattern in patterns:
        if problem := pattern_problem(pattern):
            text = f"want names of linears, but {problem}"
            raise PydanticCustomError("pattern", text)  # type: ignore[arg-type]
    return patterns


#: A factor of what is learned; those in use are below a thousand.
_Factor = AtMost(10**6)
_Alpha = Annotated[Positive, _Factor]
_Weight = Annotated[NotNegative, _Factor]
_Ranks = Annotated[dict[Text, PositiveInt], AfterValidator(_checked_patterns)]
_Alphas = Annotated[dict[Text, _Alpha], AfterValidator(_checked_patterns)]


def _alternatives(schema: dict[str, Any]) -> None:
    """Say in a task's JSON Schema what its fields alone do not."""
    of_adapters = [name for name in schema["required"] if name in _OF_ADAPTERS]
    schema["required"] = [name for name in schema["required"] if name not in ("name", *of_adapters)]
    schema["if"] = {"properties": {"adapter": {"const": FULL}}, "required": ["adapter"]}
    schema["else"] = {"required": of_adapters}
    schema["anyOf"] = [{"required": ["steps"]}, {"required": ["epochs"]}]


@dataclass(frozen=True)
class TaskConfig(FileModel):
    """One tenant's fine-tuning job."""

    __pydantic_config__ = ConfigDict(
        **FileModel.__pydantic_config__, json_schema_extra=_alternatives
    )

    name: FolderName
    """The adapter's folder; the task in metrics and reports."""
    rank: Rank
    """Rank of the adapter, LoRA's r."""
    lora_alpha: _Alpha
    """The adapter is scaled by lora_alpha / rank (rslora: by lora_alpha / sqrt(rank))."""
    target_modules: _Modules
    """all-linear, or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj,
    embed_tokens and lm_head."""
    global_batch_size: Annotated[PositiveInt, AtMost(2**20)]
    """Sequences of this task in every step, over all devices; examples of objectives that
    compare answers."""
    dataset_name: _Names
    """<data-dir>/<name>.jsonl, a path, an embedded task, or owner/name of the Hugging Face hub; of
    several, the rows one after another."""
    context_length: NumTokens
    """Most tokens of a sequence; longer ones are cut."""
    json_key: Text | None = None
    """The field that holds the text of a row without instructions, if not text."""
    max_samples: PositiveInt | None = None
    """At most so many rows of each of its data sets, the first ones."""
    steps: Annotated[PositiveInt, AtMost(10**9)] | None = None
    """Steps of this task; steps or epochs must be given."""
    epochs: Annotated[PositiveInt, AtMost(10**6)] = 1
    """Passes over its data, where steps is not given."""
    learning_rate: Annotated[Positive, AtMost(10, "AdamW moves a weight by it in a step")] = 1e-4
    """The optimiser's step size."""
    weight_decay: NotNegative = 0.0
    """The optimiser's: AdamW's decoupled one, SGD's added to the gradient."""
    optimizer: _Optimizer = "adamw"
    """Of this task; adamw8bit keeps its moments in 8 bits."""
    adam_beta1: Share = 0.9
    """AdamW's share of the old mean gradient in the new."""
    adam_beta2: Share = 0.999
    """AdamW's share of the old mean square in the new."""
    adam_epsilon: Positive = 1e-8
    """What AdamW adds to the root of the mean square."""
    momentum: Share = 0.0
    """SGD's share of the old direction in the new."""
    loraplus_ratio: Annotated[Positive, _Factor] = 1.0
    """LoRA+: B and vectors learn at so many times the learning rate."""
    lr_scheduler: _Scheduler = "constant"
    """Over the task's own steps, as in transformers."""
    warmup_steps: Annotated[Count, AtMost(10**9)] = 0
    """Steps in which the learning rate rises from 0."""
    max_grad_norm: Annotated[NotNegative, Wanted("a number of 0 or more (0: no clipping)")] = 1.0
    """The norm the task's gradient is clipped to; 0: never."""
    lora_dropout: Annotated[Share, AtMost(0.999, "what is left is scaled up by the rest")] = 0.0
    """Dropout before the adapter, in training."""
    seed: Count = 0
    """Of the adapter's first values and the order of the sequences."""
    prompt: _Prompt = "auto"
    """How a row becomes text; a template is such as "Q: {instruction} {input}\\nA: {output}"."""
    train_on_inputs: Flag = False
    """Learn the prompt's tokens too, not only the answer's."""
    validation_split: Share = 0.0
    """Share of the sequences held out to measure their loss."""
    early_stopping_patience: Count = 0
    """End after so many evaluation periods without a better loss, and export the adapter with the
    lowest validation loss; 0: never, and export the last."""
    early_stopping_min_delta: NotNegative = 0.0
    """By how much a loss must fall to be better."""
    objective: Annotated[str, OneOf(OBJECTIVES)] = SUPERVISED
    """What is learned: every token, wanted answers (dpo, cpo, orpo, kto), the same answer to two
    wordings (cit), or sampled tokens by their advantages (ppo)."""
    beta: Annotated[Positive, _Factor] = 0.1
    """Of dpo, cpo, orpo, kto: the factor of differences of log-probabilities."""
    cpo_alpha: _Weight = 1.0
    """Of cpo: what the mean loss of the chosen answers' tokens counts for."""
    desirable_weight: _Weight = 1.0
    """Of kto: what an answer with label true counts for."""
    undesirable_weight: _Weight = 1.0
    """Of kto: what an answer with label false counts for."""
    contrast_weight: _Weight = 1.0
    """Of cit: what the contrast of pairs counts for, at most as much as the tokens' loss."""
    temperature: Positive = 0.05
    """Of cit: what the likeness of two sequences is divided by."""
    clip_low: Share = 0.8
    """Of ppo: the least that the ratio of a token's probability to that when sampled counts as."""
    clip_high: Positive = 1.2
    """Of ppo: the most, 1 or more."""
    resume_from: Text | None = None
    """An adapter of this kind in PEFT's format to start from."""
    adapter: _Adapter = "lora"
    """What is trained: LoRA, scaled by the root of the rank (rslora), from principal parts on
    (pissa), with lengths of rows (dora), vectors only (vera), or the model (full)."""
    projection_prng_key: Count = 0
    """Of vera: what its frozen matrices are drawn from, as in PEFT."""
    rank_pattern: _Ranks = field(default_factory=dict)
    """Other ranks of linears that a pattern fits, as in PEFT."""
    alpha_pattern: _Alphas = field(default_factory=dict)
    """Other lora_alpha of linears, alike."""
    offload: Flag = False
    """Of full: keep the optimiser's state in the host's memory, and update there."""

    modules_to_save: _Norms = field(default_factory=tuple)
    """Norms that are trained as they are, named by the end of their path, as in PEFT."""
    bias: Annotated[str, OneOf(BIASES)] = "none"
    """Biases of the base that are trained as they are, as in PEFT: none, all, or those of linears
    with an adapter (lora_only)."""

    @property
    def dataset_names(self) -> tuple[str, ...]:
        """The names of its data sets: one, or several in order."""
        return (self.dataset_name,) if isinstance(self.dataset_name, str) else self.dataset_name

    @property
    def largest_rank(self) -> int:
        """The largest rank of any of its linears; PiSSA computes with twice as many."""
        return max([self.rank, *self.rank_pattern.values()]) * (1 + (self.adapter == "pissa"))

    @classmethod
    def stranger(cls, name: str) -> tuple[str | None, str]:
        """Return what a field that is none was meant to be, if it is known, and what to say."""
        ours, hint = foreign_field(name) or (None, "")
        return (ours, f": {hint}") if hint else super().stranger(name)

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return values of what only adapters have, where there is none."""
        if given.get("adapter") != FULL:
            return {}
        return {name: _OF_ADAPTERS[name] for name in ("rank", "lora_alpha", "target_modules")}

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Mapping[str, Mistake]:
        """Return what is wrong with steps and decay, and which fields are another optimiser's."""
        optimizer = given.get("optimizer", OPTIMIZERS[0])
        mistakes = {
            name: Mistake(f"is of {' and '.join(owners)}, the task's is {optimizer}", given[name])
            for name, owners in _OF_OPTIMIZER.items()
            if given.get(name, getattr(cls, name)) != getattr(cls, name)
            and optimizer in OPTIMIZERS
            and optimizer not in owners
        }
        rate, decay = given.get("learning_rate", cls.learning_rate), given.get("weight_decay")
        if _is_number(rate) and type(decay) in (int, float) and decay > 1 / rate:
            text = (
                f"want at most 1 / learning_rate, {1 / rate:g}: a step would turn every weight over"
            )
            mistakes["weight_decay"] = Mistake(text, decay)
        steps, warmup = given.get("steps"), given.get("warmup_steps")
        if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps > 0:
            text = f"want at most the task's steps, {steps}"
            return {**mistakes, "warmup_steps": Mistake(text, warmup)}
        mistakes |= _adapter_mistakes(given)
        mistakes |= _objective_mistakes(given)
        mistakes |= _model_mistakes(given)
        meant = {found[0] for name in given if (found := foreign_field(name))}
        if not {"steps", "epochs"} & (given.keys() | meant):
            text = "neither steps nor epochs is given, want at least one"
            return {**mistakes, "steps": Mistake(text)}
        return mistakes


def _adapter_mistakes(given: Mapping[str, Any]) -> dict[str, Mistake]:
    """Return what is wrong with fields that not every kind of adapter has."""
    kind = given.get("adapter", "lora")
    mistakes: dict[str, Mistake] = {}
    if kind == "vera":
        mistakes |= {
            name: Mistake("vera has one rank for all linears and no scale", given[name])
            for name in ("rank_pattern", "alpha_pattern")
            if given.get(name)
        }
    if kind == "pissa" and "resume_from" in given:
        text = (
            "pissa starts from the base's principal parts; go on from an exported one as plain "
            "LoRA, with adapter: lora and twice the rank and lora_alpha"
        )
        mistakes["resume_from"] = Mistake(text, given["resume_from"])
    trains_biases = given.get("bias", "none") != "none"
    if trains_biases and kind == "vera":
        mistakes["bias"] = Mistake("vera trains vectors of its own only", given["bias"])
    if given.get("loraplus_ratio", 1.0) != 1.0:
        targets = _one_or_more(given.get("target_modules"))
        if trains_biases or (isinstance(targets, list | tuple) and EMBEDDING in targets):
            text = f"LoRA+ has other rates for biases and {EMBEDDING}: train them without it"
            mistakes["loraplus_ratio"] = Mistake(text, given["loraplus_ratio"])
    return mistakes


def _objective_mistakes(given: Mapping[str, Any]) -> dict[str, Mistake]:
    """Return what is wrong with the fields that only some objectives have."""
    objective = given.get("objective", SUPERVISED)
    if objective not in OBJECTIVES:
        return {}
    own = PARAMETERS[objective]
    high = given.get("clip_high", 1)
    if objective == PPO and _is_number(high) and high < 1:
        return {"clip_high": Mistake("want a number of 1 or more", high)}
    foreign = {name for names in PARAMETERS.values() for name in names} - {*own}
    if objective != SUPERVISED:
        foreign.add("train_on_inputs")
    return {
        name: Mistake(f"objective {objective} has no such field: remove it", given[name])
        for name in sorted(foreign & given.keys())
        if given[name] not in (None, getattr(TaskConfig, name))
    }


def _model_mistakes(given: Mapping[str, Any]) -> dict[str, Mistake]:
    """Return what is wrong with the fields of a task that trains the model itself."""
    if given.get("adapter") != FULL:
        text = "only adapter: full has it: remove it"
        return {"offload": Mistake(text, True)} if given.get("offload") is True else {}
    mistakes = {
        name: Mistake("adapter: full trains no adapter: remove it", given[name])
        for name, nothing in _OF_ADAPTERS.items()
        if given.get(name, nothing) != nothing
    }
    if given.get("early_stopping_patience"):
        text = "adapter: full keeps no model but the last: remove it"
        mistakes["early_stopping_patience"] = Mistake(text, given["early_stopping_patience"])
    if given.get("objective") in ("dpo", KTO):
        text = "adapter: full changes the model that answers would be compared with: want another"
        mistakes["objective"] = Mistake(text, given["objective"])
    return mistakes


def _is_number(value: Any) -> bool:
    """Return whether a value is a positive number that arithmetic takes."""
    return type(value) in (int, float) and 0 < value < 1e100


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
        if not isinstance(wanted_tasks, int) or not isinstance(entries, list):
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
            if task.adapter == FULL
        ]
    problems.prefixed(f"{path}: ").raise_if_any()
    assert file is not None
    tasks = tuple(file.task[: num_tasks or file.train_task_num])
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
