"""The sweep: what more or fewer GPUs would change."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError
from lobra.common.files import atomic_path
from lobra.planner.deploy import Deployment, Options, deploy, homogeneous_entry, plan_entries
from lobra.planner.outcome import Progress, silent
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

MOST_SIZES = 15
SIZE_LIMIT_S = 2.0
SUFFIXES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Sizing:
    """The best plan found on ``num_gpus`` GPUs, or the reason why there is none."""

    num_gpus: int
    deployment: Deployment | None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the sizing for ``--json``: ``num_gpus`` are those the plan uses."""
        if self.deployment is None:
            return {"gpus_available": self.num_gpus, "plan": None, "reason": self.reason}
        outcome = self.deployment.outcome
        return {
            "gpus_available": self.num_gpus,
            "plan": plan_entries(outcome.plan),
            "num_gpus": outcome.plan.num_gpus,
            "step_time_s": outcome.step_time_s,
            "gpu_seconds": outcome.gpu_seconds,
            "lower_bound_s": outcome.lower_bound_s,
            "gap": outcome.gap,
            "homogeneous": homogeneous_entry(self.deployment),
        }


def parse_range(text: str) -> list[int]:
    """Return the GPU counts of ``LOW:HIGH`` (about 15 of them) or ``LOW:HIGH:STEP``.

    Raises
    ------
    ConfigError
        If it is written otherwise, or is empty.
    """
    parts = text.split(":")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or numbers[0] < 1 or numbers[1] < numbers[0] or numbers[-1] < 1:
        raise ConfigError(f"--sweep-gpus: {text!r}; write LOW:HIGH or LOW:HIGH:STEP, as in 8:64:8")
    low, high = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else max(1, -(-(high - low) // (MOST_SIZES - 1)))
    return list(range(low, high + 1, step))


def sweep(
    workload: Workload,
    memory: MemoryProfile,
    cost_model: CostModel,
    gpus: Sequence[int],
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> list[Sizing]:
    """Plan for every number of GPUs, two seconds each unless a time limit is given."""
    if options.time_limit_s is None:
        options = replace(options, time_limit_s=SIZE_LIMIT_S)
    sizings = []
    for number in gpus:
        progress(f"{number} GPUs")
        try:
            found = deploy(workload, memory, cost_model, number, options, progress, refused)
            sizings.append(Sizing(number, found))
        except ConfigError as error:
            sizings.append(Sizing(number, None, str(error)))
    return sizings


def plot_problem(path: str | os.PathLike[str]) -> str | None:
    """Return what is wrong with the name of a picture, or None."""
    if Path(path).suffix.lower() in SUFFIXES:
        return None
    return f"--plot: {os.fspath(path)!r}; a .png, .pdf or .svg file is expected"


def plot(sizings: Sequence[Sizing], path: str | os.PathLike[str]) -> None:
    """Draw step time and GPU-seconds against GPUs, the best homogeneous plan beside.

    Raises
    ------
    ConfigError
        If the file's suffix is not one that can be drawn, or no sizing has a plan.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [sizing.deployment for sizing in sizings if sizing.deployment is not None]
    if not found:
        raise ConfigError("--plot: no number of GPUs has a plan")
    problem = plot_problem(path)
    if problem:
        raise ConfigError(problem)
    gpus = [d.problem.num_gpus for d in found]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    left.fill_between(
        gpus,
        [d.outcome.lower_bound_s for d in found],
        [d.outcome.step_time_s for d in found],
        alpha=0.3,
        label="between bound and plan",
    )
    left.plot(gpus, [d.outcome.step_time_s for d in found], "o-", label="plan")
    right.plot(gpus, [d.outcome.gpu_seconds for d in found], "o-", label="plan")
    same = [d.homogeneous for d in found if d.homogeneous is not None]
    used = [d.problem.num_gpus for d in found if d.homogeneous is not None]
    left.plot(used, [h.step_time_s for h in same], "s--", label="best homogeneous")
    right.plot(used, [h.gpu_seconds for h in same], "s--", label="best homogeneous")
    for axis, title in ((left, "step time [s]"), (right, "GPU-seconds per step")):
        axis.set_xlabel("GPUs")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.legend()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
