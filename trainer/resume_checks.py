"""Whether a run may go on from a checkpoint: its tasks, data, base model, and whom to revive."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lobra.model.fingerprint import MARK
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.run_spec import RunSpec

log = logging.getLogger(__name__)

# What must be the same for a task to go on; the rest may be changed between runs.
FIXED_FIELDS = (
    *("name", "rank", "lora_alpha", "target_modules", "adapter", "rank_pattern", "alpha_pattern"),
    *("projection_prng_key", "modules_to_save", "bias"),
    *("global_batch_size", "seed", "optimizer", "momentum"),
)
#: What those are in records of versions that did not have them.
_BEFORE: dict[str, Any] = {
    **dict(
        adapter="lora",
        rank_pattern={},
        alpha_pattern={},
        optimizer="adamw",
        momentum=0.0,
        projection_prng_key=0,
        modules_to_save=[],
        bias="none",
    )
}
# What decides which sequences there are: named if they are others and this is why.
DATA_FIELDS = (
    *("dataset_name", "json_key", "max_samples", "prompt", "train_on_inputs"),
    *("context_length", "validation_split", "objective"),
)


def task_record(task: TaskConfig, data: TokenizedDataset) -> dict[str, Any]:
    """Return what identifies a task and its data, to be compared when a run goes on.

    `data` is what the task trains on, without what is held out.
    """
    record = {name: getattr(task, name) for name in (*FIXED_FIELDS, *DATA_FIELDS)}
    record["target_modules"] = list(task.target_modules)
    record["modules_to_save"] = list(task.modules_to_save)
    record["dataset_name"] = list(task.dataset_names)
    record["json_key"] = task.json_key or "text"  # as versions noted it that had this default
    record["num_sequences"] = len(data)
    digest = hashlib.sha256()
    optional = (data.signs, data.logprobs, data.advantages)
    for array in (data.tokens, data.labels, data.offsets, *optional):
        if array is not None:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    record["data_sha256"] = digest.hexdigest()[:16]
    return record


def resume_problems(
    state: CheckpointState,
    tasks: Sequence[dict[str, Any]],
    seed: int,
    base_model: str,
    source: str,
    base_precision: str | None = None,
) -> list[str]:
    """Return why a run with these task records cannot go on from a checkpoint (empty: it can).

    Where tasks have other names, that is all: it is most likely another run.
    """
    before = {record["name"]: record for record in state.tasks}
    now = {record["name"] for record in tasks}
    parts = {"lacks": sorted(before.keys() - now), "has besides": sorted(now - before.keys())}
    if others := [f"{verb} {', '.join(names)}" for verb, names in parts.items() if names]:
        return [
            f"--resume: {source} has other tasks than the checkpoint: it {' and '.join(others)}; "
            f"give the task file of that run, or start a new one in another --output-dir"
        ]
    problems = []
    if state.seed != seed:
        problems.append(f"--resume: the checkpoint was made with --seed {state.seed}, not {seed}")
    if state.base_model != base_model:
        problems.append("--resume: --model is not the base model the checkpoint was trained on")
    if state.base_precision != base_precision:
        was = state.base_precision
        remedy = f"in {was}: give --base-precision {was}" if was else "that was not quantised"
        problems.append(f"--resume: the checkpoint was trained on a base {remedy}")
    for new in tasks:
        old = _BEFORE | before[new["name"]]
        changed = [field for field in FIXED_FIELDS if new[field] != old.get(field)]
        if new["data_sha256"] != old.get("data_sha256"):
            why = [f for f in DATA_FIELDS if f in old and new[f] != old[f]]
            if not why and "seed" not in changed and state.seed == seed:
                problems.append(_changed_data(old, new))
            changed += why
        problems += [
            f"--resume: task {new['name']}: {field} is {new[field]!r}, "
            f"in the checkpoint {old.get(field)!r}"
            for field in changed
        ]
    return problems


def _changed_data(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return what to do about data that are others than before, though asked for alike.

    Checkpoints of older versions do not say how their data were asked for.
    """
    names = ", ".join(map(repr, new["dataset_name"]))
    counts = f"{old.get('num_sequences')} sequences to train on then, {new['num_sequences']} now"
    fields = "" if DATA_FIELDS[0] in old else f", or the task's {', '.join(DATA_FIELDS)},"
    return (
        f"--resume: task {new['name']}: its data set {names} is not what the checkpoint was "
        f"trained on ({counts}); restore its files{fields} and the model's tokenizer as they were, "
        f"or start a new run in another --output-dir"
    )


def revival_problems(state: CheckpointState, revived: Sequence[str]) -> list[str]:
    """Return why the tasks named to be revived cannot be (empty: they can)."""
    stopped = {name: own.stopped for name, own in state.progress.items()}
    waiting = [name for name, why in stopped.items() if why is not None]
    problems = []
    for name in revived:
        if name not in stopped:
            problems.append(
                f"--revive {name}: the checkpoint has no such task; it has {', '.join(stopped)}"
            )
        elif stopped[name] is None:
            known = f"stopped are {', '.join(waiting)}" if waiting else "no task is"
            problems.append(f"--revive {name}: this task is not stopped; {known}")
    return problems


def revivals_in_vain(
    state: CheckpointState, revived: Sequence[str], num_steps: Mapping[str, int]
) -> list[str]:
    """Return a problem for every stopped task that would train nothing if it were revived.

    `num_steps` are the steps each task is to run now, by its name.
    """
    return [
        f"--revive {name}: its {num_steps[name]} steps are over; raise its steps"
        for name, progress in state.progress.items()
        if name in revived and progress.stopped is not None
        if name in num_steps and num_steps[name] <= progress.steps
    ]


def warn_of_old_fingerprint(state: CheckpointState) -> None:
    """Warn where a checkpoint says too little about its base model to tell another one."""
    if not state.base_model.startswith(MARK):
        log.warning(
            "the checkpoint is of an older version, which knew the base model by the start of its "
            "files only: see to it that --model is the one it was trained on"
        )


def warn_of_other_rounding(state: CheckpointState, run: RunSpec) -> None:
    """Warn where a run goes on in another precision, or with other micro-batches."""
    if state.precision not in (None, run.precision):
        log.warning(
            "the run goes on in %s, so far it was in %s: what the checkpoint holds is rounded to "
            "it, and the result is of neither precision (--precision %s keeps to it)",
            run.precision, state.precision, state.precision,
        )  # fmt: skip
    if state.batching != run.batching:
        log.warning(
            "the run goes on with %s micro-batches, so far they were %s: what is computed is the "
            "same but for rounding",
            run.batching, state.batching,
        )  # fmt: skip
