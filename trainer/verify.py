"""Whether a run's log is true: a step computed again from a checkpoint, beside what was logged."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.log_parts import METRICS_FILE
from lobra.trainer.metrics import read_metrics
from lobra.trainer.request import TrainRequest
from lobra.trainer.run import train
from lobra.trainer.run_spec import CONFIG_FILE
from lobra.trainer.task_requests import accepted_changes

#: By precision, how far rounding may move a loss or a norm on another machine or plan.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 2e-2}
COMPARED = ("loss", "grad_norm")


@dataclass(frozen=True)
class Recomputed:
    """A value of a task's step.

    Attributes
    ----------
    task
        Its name.
    name
        One of `COMPARED`.
    logged, again
        What metrics.jsonl says, and what was computed now; None for what is not finite.
    """

    task: str
    name: str
    logged: float | None
    again: float | None

    @property
    def error(self) -> float:
        """Relative to what was logged; infinite where one of the two only is finite."""
        if self.logged is None or self.again is None:
            return 0.0 if self.logged == self.again else math.inf
        return abs(self.again - self.logged) / max(abs(self.logged), 1e-30)


@dataclass(frozen=True)
class Verification:
    """A step (from 1) that was computed again from the checkpoint before it."""

    step: int
    values: tuple[Recomputed, ...]
    tolerance: float

    @property
    def is_true(self) -> bool:
        """Whether all values are what was logged, but for rounding."""
        return all(value.error <= self.tolerance for value in self.values)


def verify(folder: Path) -> Verification:
    """Compute a step of a run again, on the plan it ran on, in a folder that is then removed.

    It is the step after the newest checkpoint that has one in the log.

    Raises
    ------
    ConfigError
        The run has no such checkpoint, or what it was made of is not there any more.
    """
    config = _config(folder)
    logged = {line["step"]: line for line in read_metrics(folder)}
    plan_from = config["plans"][-1]["from_step"]
    changes = accepted_changes(folder)
    changed_at = {change.step for change in changes}  # after the checkpoint
    watched = [
        change.step
        for change in changes
        if change.request.task is not None and config.get("watch_tasks")
    ]
    able = [
        step
        for step in list_checkpoints(folder)
        if step in logged and logged[step].get("plan_from", 0) == plan_from
        if step not in changed_at
        if step >= max(watched, default=step)  # else the task file has more than the checkpoint
    ]
    if not able:
        raise ConfigError(
            f"{folder}: --verify: no checkpoint of the last plan with a step after it in "
            f"{METRICS_FILE}; save more of them (--save-every, --keep-checkpoints)"
        )
    step = able[-1]
    with tempfile.TemporaryDirectory(prefix="lobra-verify-") as name:
        again = _computed_again(config, folder.absolute(), step, Path(name))
    values = [
        Recomputed(task, name, own[name], again["tasks"].get(task, {}).get(name))
        for task, own in logged[step]["tasks"].items()
        for name in COMPARED
    ]
    return Verification(step + 1, tuple(values), TOLERANCES[config["precision"]])


def _config(folder: Path) -> dict[str, Any]:
    config = read_document(folder / CONFIG_FILE)
    if not isinstance(config, dict) or not {"plans", "precision", "plan_meta"} <= config.keys():
        raise ConfigError(f"{folder / CONFIG_FILE}: --verify: not of a run of this version")
    return config


def _computed_again(
    config: dict[str, Any], folder: Path, step: int, scratch: Path
) -> dict[str, Any]:
    """Return the line of metrics.jsonl that the step after a checkpoint gives now."""
    meta = {**(config["plan_meta"] or {}), "ranks": config["rank_map"]}
    plan = yaml.safe_dump({"strategy_config": config["plan"], "meta": meta}, sort_keys=False)
    write_atomic(scratch / "plan.yaml", plan)
    run = scratch / "run"
    step_folder(run, step).parent.mkdir(parents=True)
    step_folder(run, step).symlink_to(step_folder(folder, step))
    bucketed = config["batching"] == "bucketed"
    request = TrainRequest(
        model=config["model"],
        trainer_config=config["trainer_config"],
        strategy_config=str(scratch / "plan.yaml"),
        output_dir=run,
        data_dir=Path(config["data_dir"]),
        num_tasks=config["num_tasks"],
        max_steps=step + 1,
        max_seq_length=config["max_seq_length"],
        precision=config["precision"],
        base_precision=config.get("base_precision"),
        device=config["device"],
        batching=config["batching"],
        dp_bucket=("on" if config["dp_bucket"] else "off") if bucketed else None,
        num_buckets=config["num_buckets"],
        dispatch=config["dispatch"] if bucketed else None,
        seed=config["seed"],
        feedback="on" if config["feedback"] else "off",
        validate_every=config["validate_every"],
        save_every=0,
        resume=(step,),
        time_profile=Path(config["time_profile"]["path"]),
        cost_model=config["cost_model"],
        report_to="none",
        deterministic=config["deterministic"],
        gpus_per_node=config["gpus_per_node"],
    )
    train(request)
    return read_metrics(run)[-1]
