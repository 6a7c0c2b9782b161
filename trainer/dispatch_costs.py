"""The cost model that a run's dispatcher balances replicas with."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.profiler.cost_model import CostModel, load_cost_model
from lobra.profiler.lookup import (
    base_precision_problem,
    no_time_profile,
    provenance_note,
    time_path,
)
from lobra.trainer.request import TrainRequest

log = logging.getLogger(__name__)


def missing_profile(request: TrainRequest) -> list[str]:
    """Return a problem if there is no time profile."""
    path = _profile_path(request)
    if os.path.exists(path):
        return []
    return [no_time_profile(request.model, path, request.base_precision)]


def _profile_path(request: TrainRequest) -> Path:
    return Path(request.time_profile or time_path(request.model, request.base_precision))


def dispatch_costs(request: TrainRequest, plan: Plan, quantised: str | None = None) -> CostModel:
    """Return the cost model the dispatcher balances with, the base's linears being kept so.

    Raises
    ------
    ConfigError
        There is no time profile, or it lacks a tensor-parallel degree of the plan.
    """
    path = _profile_path(request)
    model = load_cost_model(request.model, path, request.cost_model)
    if origin := provenance_note(path):
        log.warning("replicas are balanced by %s", origin)
    if problem := base_precision_problem(path, quantised):
        log.warning("replicas are balanced, and steps predicted, by other times: %s", problem)
    wanted = sorted({group.layout for group in plan.groups})
    for memory in sorted({layout.memory for layout in wanted if layout.memory != "keep"}):
        unknown = sorted({one.tp for one in wanted if one.memory == memory and not model.has(one)})
        if unknown:
            sizes = ",".join(map(str, unknown))
            log.warning(
                "%s: has no times of tp %s with memory %s, which the plan asks for: replicas are "
                "balanced and predicted as if they kept all, steps take longer than predicted; "
                "measure them with lobra profile time --tp %s --memory %s",
                path, sizes, memory, sizes, memory,
            )  # fmt: skip
            model = model.taking_kept_times(memory)
    missing = dict.fromkeys(model.missing(layout) for layout in wanted if not model.has(layout))
    if missing:
        raise ConfigError(list(missing))
    return model
