"""The picture of a sweep over numbers of GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.common.files import atomic_path
from lobra.planner.sweep import Sizing

SUFFIXES = (".png", ".pdf", ".svg")


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
