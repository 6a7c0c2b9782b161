"""What a run's request names, read: its tasks, its plan, its base model, and its checkpoint."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from lobra.common.errors import Problems
from lobra.layout.plan import Plan
from lobra.layout.shapes import ModelShape, read_shape
from lobra.model.checkpoint import checkpoint_problems
from lobra.model.folder import resolve_folder
from lobra.tasks.task_file import TrainerConfig, load_trainer_config
from lobra.trainer.checkpoint import CheckpointState, read_state
from lobra.trainer.log_parts import METRICS_FILE
from lobra.trainer.metrics import kept_metrics
from lobra.trainer.plan_checks import requested_plan
from lobra.trainer.request import TrainRequest
from lobra.trainer.resume_checks import revival_problems
from lobra.trainer.run_folder import occupied, unusable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunInputs:
    """What a request names; what cannot be read is None.

    Attributes
    ----------
    config
        The task file.
    plan
        The plan, under the memory policy that was asked for.
    folder, shape
        The base model: its folder, and its sizes with linears kept as was asked for.
    is_whole
        Whether the base's files hold what its sizes say.
    state
        The checkpoint that the run goes on from; None also where it begins.
    may_start
        Whether the run's folder may be used, and has the checkpoint that was asked for.
    """

    config: TrainerConfig | None
    plan: Plan | None
    folder: Path | None
    shape: ModelShape | None
    is_whole: bool
    state: CheckpointState | None
    may_start: bool


def read_inputs(request: TrainRequest, problems: Problems, bad_tasks: Problems) -> RunInputs:
    """Return what a request names; ``problems`` gets what is wrong with it.

    ``bad_tasks`` gets what is wrong with tasks: other problems if these are left out for that.
    """
    config = problems.result_of(
        load_trainer_config,
        request.trainer_config,
        request.num_tasks,
        bad_tasks if request.skip_bad_tasks else None,
        whole_models=True,
    )
    plan = problems.result_of(requested_plan, request)
    folder = problems.result_of(resolve_folder, request.model)
    shape = None if folder is None else problems.result_of(_base_shape, folder, request)
    damage = Problems()
    if folder is not None and shape is not None:
        damage = checkpoint_problems(folder, shape)
        problems += damage
    if request.confine is not None and not os.path.isdir(request.confine):
        problems.add(f"--confine {request.confine}: no such folder")
    state, may_start = _checkpoint(request, folder, problems)
    return RunInputs(config, plan, folder, shape, not damage, state, may_start)


def _base_shape(folder: Path, request: TrainRequest) -> ModelShape:
    return read_shape(folder).kept_in(request.base_precision)


def _checkpoint(
    request: TrainRequest, folder: Path | None, problems: Problems
) -> tuple[CheckpointState | None, bool]:
    """Return the checkpoint to go on from, if the run does, and whether nothing is in its way."""
    blocked = unusable(request.output_dir, [request.data_dir, *([folder] if folder else [])])
    if not request.is_resumed:
        blocked = blocked or occupied(request.output_dir)
    problems += blocked
    if blocked or not request.is_resumed:
        return None, not blocked
    state = problems.result_of(read_state, request.output_dir, request.resume_step)
    if state is not None:
        problems += revival_problems(state, request.revive)
        _warn_of_the_log(request.output_dir, state)
    return state, state is not None


def _warn_of_the_log(folder: Path, state: CheckpointState) -> None:
    """Warn where metrics.jsonl is damaged, or lacks steps that the run has made."""
    path = folder / METRICS_FILE
    kept = kept_metrics(folder, state.step, state.last_metrics)
    if kept.damage:
        log.warning("%s: will be set aside, what is whole of it kept: %s", path, kept.damage)
    if gone := kept.missing(state.step):
        log.warning(
            "%s: lacks %d of the steps so far, the first of them step %d; reports will not have "
            "them",
            path, len(gone), gone[0] + 1,
        )  # fmt: skip
