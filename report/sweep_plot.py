"""The picture of a sweep: over numbers of GPUs, context limits or accelerators."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.common.errors import ConfigError
from lobra.planner.outcome import SampledMean
from lobra.planner.sweep import Sizing
from lobra.report.style import COMPARED, OURS, curve, draw, explain, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
STOPPED: Any = {
    "color": COMPARED,
    "marker": "o",
    "markersize": 9,
    "linestyle": "",
    "fillstyle": "none",
}
GPUS, CONTEXTS, ACCELERATORS = "GPUs", "longest sequence [tokens]", "accelerator"


def plot_problem(path: str | os.PathLike[str]) -> str | None:
    """Return what is wrong with the name of a picture, or None."""
    if Path(path).suffix.lower() in SUFFIXES:
        return None
    return f"--plot: {os.fspath(path)!r}; a .png, .pdf or .svg file is expected"


def plot(sizings: Sequence[Sizing], path: str | os.PathLike[str]) -> None:
    """Draw step time and what a step costs: the price of a million tokens, else GPU-seconds.

    Over the numbers of GPUs, else over the context limits, else over the accelerators; what else
    differs are lines of their own. Plans whose search the time limit stopped have a ring. With one
    line, its bound and the best homogeneous plan beside.

    Raises
    ------
    ConfigError
        If the file's suffix is not one that can be drawn, or no sizing has a plan.
    """
    found = [sizing for sizing in sizings if sizing.deployment is not None]
    if not found:
        raise ConfigError("--plot: there is no plan to draw")
    problem = plot_problem(path)
    if problem:
        raise ConfigError(problem)
    draw(Path(path), lambda: _picture(found))


def _picture(found: Sequence[Sizing]) -> Figure:
    label, place = _axis(found)
    lines: dict[str, list[Sizing]] = {}
    for sizing in found:
        lines.setdefault(_line(sizing, label), []).append(sizing)
    has_prices = all(sizing.cost_per_million_tokens is not None for sizing in found)
    figure = make_figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    for number, (name, own) in enumerate(lines.items()):
        places = [place(sizing) for sizing in own]
        times = [_mean(sizing).mean_step_time_s for sizing in own]
        if has_prices:
            costs = [sizing.cost_per_million_tokens for sizing in own]
        else:
            costs = [_mean(sizing).mean_gpu_seconds for sizing in own]
        left.plot(places, times, **curve(number), label=name or "plan")
        right.plot(places, costs, **curve(number), label=name or "plan")
    stopped = [sizing for sizing in found if sizing.is_stopped]
    if stopped:
        times = [_mean(sizing).mean_step_time_s for sizing in stopped]
        left.plot([*map(place, stopped)], times, **STOPPED, label="stopped by the time limit")
    if len(lines) == 1:
        _draw_beside(left, right, [(place(sizing), sizing) for sizing in found], has_prices)
    titles = "step time [s]", "cost per million tokens" if has_prices else "GPU-seconds per step"
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_xlabel(label)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    explain(figure)
    return figure


def _axis(sizings: Sequence[Sizing]) -> tuple[str, Callable[[Sizing], Any]]:
    """Return what is drawn along the picture, and where a sizing is."""
    several_gpus, several_contexts, several_names = (
        len({getattr(sizing, name) for sizing in sizings}) > 1
        for name in ("num_gpus", "context", "accelerator")
    )
    if several_contexts and not several_gpus:
        return CONTEXTS, lambda sizing: sizing.context
    if several_names and not several_gpus:
        return ACCELERATORS, lambda sizing: sizing.accelerator
    return GPUS, lambda sizing: sizing.num_gpus


def _line(sizing: Sizing, label: str) -> str:
    """Return what tells a line from others."""
    names = [sizing.accelerator] if sizing.accelerator and label != ACCELERATORS else []
    if sizing.context is not None and label != CONTEXTS:
        names.append(f"{sizing.context} tokens")
    return ", ".join(names)


def _draw_beside(
    left: Axes, right: Axes, sizings: Sequence[tuple[Any, Sizing]], has_prices: bool
) -> None:
    """Draw what a single line is compared with: its bound, and the best homogeneous plan."""
    places = [place for place, _ in sizings]
    bounds = [_mean(sizing).lower_bound_s for _, sizing in sizings]
    times = [_mean(sizing).mean_step_time_s for _, sizing in sizings]
    left.fill_between(places, bounds, times, color=OURS, alpha=0.3, label="between bound and plan")
    same = [
        (place, sizing.deployment.with_sync(sizing.deployment.homogeneous))
        for place, sizing in sizings
        if sizing.deployment is not None and sizing.deployment.homogeneous is not None
    ]
    used = [place for place, _ in same]
    look: Any = {"color": COMPARED, "marker": "s", "linestyle": "--", "label": "best homogeneous"}
    left.plot(used, [plan.step_time_s for _, plan in same], **look)
    if not has_prices:
        right.plot(used, [plan.gpu_seconds for _, plan in same], **look)


def _mean(sizing: Sizing) -> SampledMean:
    assert sizing.deployment is not None
    return sizing.deployment.sampled
