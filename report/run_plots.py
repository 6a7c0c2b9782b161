"""Pictures of a run: losses, step times, what the replicas did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.report.run_plans import PlanPart
from lobra.report.style import (
    GROUND,
    OURS,
    VERMILLION,
    draw,
    explain,
    lie_down,
    make_axes,
    make_figure,
    shortened,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "report"
SMOOTHING = 0.8  # of the loss curves; single steps are drawn faintly behind
MOST_COLUMNS = 4  # of panels beside each other
MOST_ROWS_NAMED = 24  # of replicas
STEPS_SHOWN = 12  # by the timeline
LONGEST_NAME = 28  # above a panel
ROOM_FOR_SHARE = 7  # per cent: what a bar must be long to have its number in it
RESUMED: dict[str, Any] = {"color": "0.45", "linewidth": 0.9, "linestyle": ":"}
PLAN_CHANGED: dict[str, Any] = {"color": "0.25", "linewidth": 0.9, "linestyle": "--"}


def plot_run(folder: Path, parts: Sequence[PlanPart], resumes: Sequence[int] = ()) -> list[Path]:
    """Write a run's pictures under `folder`/report; return them.

    `resumes` are the steps (0-based) at which the run went on after it had stopped.
    """
    out = folder / FOLDER
    return [
        draw(out / "losses.png", lambda: losses(parts, resumes)),
        draw(out / "step_time.png", lambda: step_times(parts, resumes)),
        draw(out / "replicas.png", lambda: replicas(parts)),
        draw(out / "timeline.png", lambda: timeline(parts[-1])),
    ]


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Return the exponential moving average, without the bias of its start."""
    average, norm, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(average / norm)
    return result


def losses(parts: Sequence[PlanPart], resumes: Sequence[int] = ()) -> Figure:
    """Return every task's losses over the steps, each task in a panel of its own."""
    steps = [step for part in parts for step in part.steps]
    names = list(dict.fromkeys(name for step in steps for name in step["tasks"]))
    columns = min(MOST_COLUMNS, ceil(sqrt(len(names))))
    rows = ceil(len(names) / columns)
    figure = make_figure(max(7.0, 2.7 * columns), max(3.5, 1.8 * rows) + 0.6)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes, name in zip(panels, names, strict=False):
        at, training = _values(steps, name, "loss")
        axes.plot(at, training, color=OURS, alpha=0.3, linewidth=0.8, label="training")
        axes.plot(
            at,
            smoothed(training),
            color=OURS,
            label=f"smoothed (exponential average, {SMOOTHING})",
        )
        at, validation = _values(steps, name, "validation_loss")
        if at:
            looks = {"color": VERMILLION, "marker": "o", "linestyle": "--", "linewidth": 0.9}
            axes.plot(at, validation, label="validation", **looks)
        _mark_starts(axes, parts, resumes)
        axes.set_title(shortened(name, LONGEST_NAME))
        whole_numbers(axes)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.tick_params(labelbottom=True)
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("loss (nats per target token)", fontsize="medium")
    explain(figure)
    return figure


def _values(
    steps: Sequence[dict[str, Any]], name: str, field: str
) -> tuple[list[int], list[float]]:
    """Return the steps, counted from 1, at which a task has a value, and the values."""
    found = {step["step"] + 1: (step["tasks"].get(name) or {}).get(field) for step in steps}
    known = {step: value for step, value in found.items() if value is not None}
    return list(known), list(known.values())


def _mark_starts(axes: Axes, parts: Sequence[PlanPart], resumes: Sequence[int]) -> None:
    """Draw a line where the run went on: with another plan, or the same."""
    changes = {part.steps[0]["step"] for part in parts[1:]}
    for label, looks, steps in (
        ("went on with another plan", PLAN_CHANGED, changes),
        ("resumed", RESUMED, set(resumes) - changes - {0}),
    ):
        for number, step in enumerate(sorted(steps)):
            axes.axvline(step + 0.5, label=None if number else label, zorder=0.5, **looks)


def step_times(parts: Sequence[PlanPart], resumes: Sequence[int] = ()) -> Figure:
    """Return measured and predicted step times; under them, which steps ran on which plan."""
    figure, axes = make_axes()
    steps = [step for part in parts for step in part.steps]
    at = [step["step"] + 1 for step in steps]
    axes.plot(at, [s["step_time_s"] for s in steps], color=OURS, label="measured")
    predicted = [s["predicted_step_time_s"] for s in steps]
    axes.plot(at, predicted, color=VERMILLION, linestyle="--", label="predicted")
    _mark_starts(axes, parts, resumes)
    axes.set_ylim(bottom=0)
    whole_numbers(axes)
    if len(parts) > 1:
        for part in parts:
            begin = max(part.steps[0]["step"] + 0.5, axes.get_xlim()[0])
            axes.annotate(
                str(part.number), (begin, 1.0), xycoords=("data", "axes fraction"),
                xytext=(2, 0), textcoords="offset points", va="bottom",
            )  # fmt: skip
    plans = [part.title for part in parts] if len(parts) > 1 else []
    axes.set_xlabel("\n".join(["step", *plans]))
    axes.set_ylabel("step time (s)")
    explain(figure)
    return figure


def replicas(parts: Sequence[PlanPart]) -> Figure:
    """Return what part of a plan's steps each of its replicas computed, each plan in a panel."""
    heights = [_height_in(part) for part in parts]
    figure = make_figure(8.0, sum(heights) + 0.45 * len(parts) + 0.9)
    panels = figure.subplots(len(parts), 1, squeeze=False, sharex=True, height_ratios=heights)
    for axes, part in zip(panels.flat, parts, strict=True):
        total_s = sum(step["step_time_s"] for step in part.steps)
        busy = [
            100 * sum(step["replicas"][index]["busy_s"] for step in part.steps) / total_s
            for index in range(len(part.layouts))
        ]
        rows = range(len(busy))
        axes.barh(rows, [100] * len(busy), color=GROUND)
        axes.barh(rows, busy, color=OURS)
        for row in _name_replicas(axes, part):
            inside = busy[row] > ROOM_FOR_SHARE
            looks = {"color": "white", "ha": "right"} if inside else {"ha": "left"}
            place = busy[row] + (-0.7 if inside else 0.7)
            axes.text(place, row, f"{busy[row]:.0f} %", va="center", **looks)
        axes.set_xlim(0, 100)
        axes.set_title(part.title)
    axes.set_xlabel("share of the steps' time (%)")
    figure.supylabel("replica", fontsize="medium")
    _explain_bars(figure)
    return figure


def timeline(part: PlanPart) -> Figure:
    """Return what each replica did in a plan's last steps: computed, then waited for the others."""
    part = replace(part, steps=part.steps[-STEPS_SHOWN:])
    ends_s = list(accumulate(step["step_time_s"] for step in part.steps))
    starts_s = [0.0, *ends_s[:-1]]
    figure = make_figure(9.5, _height_in(part) + 1.3)
    axes = figure.add_subplot()
    rows = range(len(part.layouts))
    axes.barh(rows, [ends_s[-1]] * len(rows), color=GROUND)
    for step, start_s, end_s in zip(part.steps, starts_s, ends_s, strict=True):
        busy_s = [replica["busy_s"] for replica in step["replicas"]]
        axes.barh(rows, busy_s, left=start_s, color=OURS)
        axes.axvline(end_s, color="white", linewidth=1.5)
        place = ((start_s + end_s) / 2, 1.0)
        axes.annotate(
            str(step["step"] + 1), place, xycoords=("data", "axes fraction"), ha="center",
            va="bottom", fontsize="small",
        )  # fmt: skip
    _name_replicas(axes, part)
    axes.set_xlim(0, ends_s[-1])
    axes.set_xlabel(f"time (s)\n{part.title}")
    axes.set_ylabel("replica")
    _explain_bars(figure)
    return figure


def _height_in(part: PlanPart) -> float:
    """Return the height of a panel with a row for every replica of a plan."""
    return 0.25 * min(len(part.layouts), 2 * MOST_ROWS_NAMED) + 0.15


def _name_replicas(axes: Axes, part: PlanPart) -> range:
    """Name the rows of a plan's replicas, if they are many only some; return which."""
    names = [f"{index} {layout}" for index, layout in enumerate(part.layouts)]
    lie_down(axes, names)
    named = range(0, len(names), ceil(len(names) / MOST_ROWS_NAMED))
    axes.set_yticks(named, names[:: named.step])
    return named


def _explain_bars(figure: Figure) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=OURS), Patch(color=GROUND)]
    labels = ["computing", "waiting, gradient reduction, optimiser"]
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
