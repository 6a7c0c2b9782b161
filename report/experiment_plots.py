"""Pictures of experiments and simulations, from their tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.report.experiment_tables import YOURS, Tables
from lobra.report.style import (
    BLACK,
    COMPARED,
    GREEN,
    GROUND,
    OURS,
    PURPLE,
    SCALE,
    VERMILLION,
    curve,
    draw,
    explain,
    lie_down,
    make_axes,
    make_figure,
    plain_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, str]
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.3}  # of published values
INTERVAL: dict[str, Any] = {"ecolor": "0.15", "elinewidth": 1.0, "capsize": 2.5}
# The looks of methods and plans, the same in every picture, drawn in this order, ours on top.
LOOKS: dict[str, dict[str, Any]] = {
    "Task-Fused": {"color": COMPARED, "marker": "^"},
    "Task-Fused, our dispatch": {"color": GREEN, "marker": "v"},
    "Task-Fused, our dispatch, 16 dynamic buckets": {"color": PURPLE, "marker": "D"},
    "LobRA's plan": {"color": VERMILLION, "marker": "s", "markersize": 8},
    "our plan": {"color": OURS, "marker": "o"},
}
# Curves of published values: the method whose rows have them, and the one that they look like.
PUBLISHED_CURVES = {
    "Task-Fused, published": ("Task-Fused", "Task-Fused"),
    "LobRA, published": ("our plan", "LobRA's plan"),
}
MANY_REPLICAS = 24  # beyond which a timeline names only some of its rows
CHARACTER_IN = 0.075  # the width of one in a timeline's bars


def plot_tables(tables: Tables, folder: Path) -> list[Path]:
    """Write every picture the tables have data for as PNG into ``folder``; return the paths."""
    return [
        draw(folder / f"{name}.png", partial(picture, tables[needs]))
        for name, (needs, picture) in PICTURES.items()
        if tables.get(needs)
    ]


def _values(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def _groups(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def _reaches(rows: Sequence[Row], column: str, low: str, high: str) -> list[list[float]]:
    """Return how far below and above the values of a column their intervals reach."""
    return [
        [float(row[column]) - float(row[low]) for row in rows],
        [float(row[high]) - float(row[column]) for row in rows],
    ]


def _cost_bars(rows: Sequence[Row], names: Sequence[str], colours: Sequence[str]) -> Figure:
    """Return GPU-seconds a step as bars with their intervals; each needs its text beside it."""
    figure, axes = make_axes(height_in=0.17 * "".join(names).count("\n") + 0.3 * len(rows) + 1.1)
    ends = _values(rows, "gpu_seconds_high")
    reaches = _reaches(rows, "gpu_seconds", "gpu_seconds_low", "gpu_seconds_high")
    axes.barh(
        range(len(rows)), _values(rows, "gpu_seconds"), color=colours, xerr=reaches,
        error_kw=INTERVAL,
    )  # fmt: skip
    lie_down(axes, names)
    axes.set_xlim(0, 1.25 * max(ends))
    axes.set_xlabel("GPU-seconds per step (mean and 95 % interval)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _methods(rows: Sequence[Row]) -> Figure:
    from matplotlib.patches import Patch

    whose = YOURS if any(row["method"].startswith(YOURS) for row in rows) else "our plan"
    ours = [row["method"].startswith((whose, "packed")) for row in rows]
    colours = [OURS if own else COMPARED for own in ours]
    figure = _cost_bars(rows, [row["method"] for row in rows], colours)
    (axes,) = figure.axes
    for place, row in enumerate(rows):
        end = float(row["gpu_seconds_high"])
        axes.text(end, place, f"  {float(row['gpu_seconds']):,.0f}", va="center")
    if any(ours) and not all(ours):
        handles = [Patch(color=OURS, label=whose), Patch(color=COMPARED, label="compared with it")]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def _ablation(rows: Sequence[Row]) -> Figure:
    owners = {"homogeneous": COMPARED, "ours": OURS}
    names, colours = [], []
    for row in rows:
        owner = row["plan_of"]
        who = "Task-Fused" if owner == "homogeneous" else _named(owner)
        buckets = f" ({row['buckets']})" if row.get("buckets") else ""
        names.append(f"{who}\n{row['rung']}{buckets}")
        colours.append(owners.get(owner, VERMILLION))
    figure = _cost_bars(rows, names, colours)
    (axes,) = figure.axes
    for place, row in enumerate(rows):
        saved = f" ({-100 * float(row['less_than_fused']):+.1f} %)" if place else ""
        text = f"  {float(row['gpu_seconds']):,.0f}{saved}"
        axes.text(float(row["gpu_seconds_high"]), place, text, va="center")
    return figure


def _buckets(rows: Sequence[Row]) -> Figure:
    figure = make_figure(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    groups = _groups(rows, "plan_of")
    for owner, own in groups.items():
        reaches = _reaches(own, "step_time_s", "step_time_low_s", "step_time_high_s")
        right.errorbar(
            _values(own, "buckets"), _values(own, "step_time_s"), yerr=reaches, capsize=2.5,
            label=_named(owner), **LOOKS.get(_named(owner), {}),
        )  # fmt: skip
    own = next(iter(groups.values()))
    shares = [100 * value for value in _values(own, "padding")]
    left.plot(_values(own, "buckets"), shares, color=BLACK, marker="o", clip_on=False)
    left.set_ylabel("padding (% of computed tokens)")
    right.set_ylabel("step time (s), mean and 95 % interval")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("buckets of a step, at most")
        axes.set_ylim(bottom=0)
    return figure


def _timeline(rows: Sequence[Row]) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch

    plans = _groups(rows, "plan_of")
    lengths = [length for row in rows if (length := _padded_length(row["what"]))]
    shortest = min(lengths, default=1)
    shades = ScalarMappable(LogNorm(shortest, max([*lengths, 2 * shortest])), SCALE)
    counts = [len(_groups(own, "replica")) for own in plans.values()]
    heights = [0.27 * min(count, 2 * MANY_REPLICAS) + 0.2 for count in counts]
    figure = make_figure(9.5, sum(heights) + 0.4 * len(plans) + 0.9)
    panels = figure.subplots(len(plans), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    inches_per_s = 7.0 / max(_values(rows, "end_s"))
    for axes, (owner, own) in zip(panels, plans.items(), strict=True):
        replicas = _groups(own, "replica")
        for place, events in enumerate(replicas.values()):
            for event in events:
                _draw_event(axes, place, event, shades, inches_per_s)
        names = [f"{key} {events[0]['layout']}" for key, events in replicas.items()]
        lie_down(axes, names)
        every = ceil(len(names) / MANY_REPLICAS)
        axes.set_yticks(range(0, len(names), every), names[::every])
        axes.set_title(_named(owner))
    panels[-1].set_xlim(left=0)
    panels[-1].set_xlabel("time in the first sampled step (s)")
    figure.supylabel("replica", fontsize="medium")
    if lengths:
        bar = figure.colorbar(shades, ax=list(panels), pad=0.01, fraction=0.03, aspect=30)
        bar.set_label("padded length of the micro-batch's sequences (tokens)")
        plain_ticks(bar.ax.yaxis)
    handles = [Patch(facecolor=GROUND, label="pipeline's bubble")]
    if any(row["what"] == "bubble" for row in rows):
        figure.legend(handles=handles, loc="outside upper left")
    return figure


def _padded_length(what: str) -> int | None:
    """Return the length to which the sequences of a micro-batch are padded: 512 of "4 x 512"."""
    found = re.fullmatch(r"\d+ x (\d+)", what)
    return int(found[1]) if found else None


def _draw_event(axes: Axes, place: int, event: Row, shades: Any, inches_per_s: float) -> None:
    """Draw what a replica does for a while, with as much of its text as there is room for."""
    start, end, what = float(event["start_s"]), float(event["end_s"]), event["what"]
    length = _padded_length(what)
    colour = GROUND if what == "bubble" else shades.to_rgba(length) if length else OURS
    axes.barh(place, end - start, left=start, color=colour, edgecolor="white", linewidth=0.6)
    if length is None:
        return
    room = (end - start) * inches_per_s / CHARACTER_IN
    dark = sum(colour[:3]) < 1.5
    for text in (what.replace(" x ", "×"), str(length)):
        if len(text) <= room:
            looks: dict[str, Any] = {"color": "white" if dark else "black", "fontsize": 7}
            axes.text((start + end) / 2, place, text, ha="center", va="center", **looks)
            return


def _scale(rows: Sequence[Row], column: str, label: str) -> Figure:
    figure, axes = make_axes(width_in=9.5)
    methods = _groups(rows, "method")
    for name, (method, like) in PUBLISHED_CURVES.items():
        own = [row for row in methods.get(method, []) if row.get("published")]
        looks = {**LOOKS[like], **HOLLOW, "linestyle": ":"}
        axes.plot(_values(own, column), _values(own, "published"), label=name, **looks)
    for name, looks in LOOKS.items():  # other methods are hardly apart from these: in the table
        own = methods.get(name, [])
        axes.plot(_values(own, column), _values(own, "relative"), label=name, **looks)
    ticks = sorted({float(row[column]) for row in rows})
    if ticks[-1] / ticks[0] > 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("GPU-seconds per step,\nrelative to Task-Fused at the first point")
    figure.legend(loc="outside right upper")
    return figure


def _scale_gpus(rows: Sequence[Row]) -> Figure:
    return _scale(rows, "gpus", "GPUs (4 tasks)")


def _scale_tasks(rows: Sequence[Row]) -> Figure:
    return _scale(rows, "tasks", "tasks (64 GPUs)")


def _predicted(rows: Sequence[Row]) -> Figure:
    figure, axes = make_axes(height_in=3.8)
    places = list(range(len(rows)))
    measured, predicted = _values(rows, "measured_lobra_s"), _values(rows, "predicted_s")
    axes.vlines(places, measured, predicted, color="0.6", linewidth=1.0)
    axes.plot(
        places,
        measured,
        "s",
        color=VERMILLION,
        label="measured (published)",
        markersize=7,
        **HOLLOW,
    )
    axes.plot(places, predicted, "o", color=OURS, label="predicted by our cost model", markersize=4)
    for place, row in zip(places, rows, strict=True):
        above = 1.12 * max(measured[place], predicted[place])
        text = f"{round(100 * float(row['difference']), 1) + 0.0:+.1f} %"  # no -0.0
        axes.text(place, above, text, ha="center", fontsize="small")
    labels = [f"{row['plan']}\n{int(row['seq_len']) // 1024}K tokens" for row in rows]
    axes.set_xticks(places, labels, fontsize="small")
    axes.grid(False, axis="x")
    axes.set_yscale("log")
    axes.margins(y=0.15)
    plain_ticks(axes.yaxis)
    axes.set_ylabel("step time (s, logarithmic)")
    explain(figure)
    return figure


def _planning(rows: Sequence[Row]) -> Figure:
    if any(row.get("tasks") for row in rows):  # several task sets: those of the scalability
        fewest = min(int(row["tasks"]) for row in rows)
        rows = [row for row in rows if int(row["tasks"]) == fewest]
    figure, axes = make_axes(width_in=9.5)
    sizes = sorted({int(row["num_gpus"]) for row in rows})
    limits: list[tuple[float, float]] = []
    patterns = _groups(rows, "pattern")
    for number, (pattern, own) in enumerate(patterns.items()):
        aside = 0.1 * (number - (len(patterns) - 1) / 2)  # what is equal lies side by side
        found = [row for row in own if row["plan"]]
        at = [sizes.index(int(row["num_gpus"])) + aside for row in found]
        axes.plot(at, _values(found, "seconds"), label=pattern, **curve(number))
        limits += [
            (place, float(row["seconds"]))
            for place, row in zip(at, found, strict=True)
            if row.get("stopped") == "True"
        ]
        known = [row for row in own if row.get("published_s") not in ("", None, "over 3600")]
        if known and found:
            at = [sizes.index(int(row["num_gpus"])) + aside for row in known]
            looks = {**curve(number), **HOLLOW, "linestyle": "none", "markersize": 7}
            axes.plot(at, _values(known, "published_s"), label=f"{pattern}, published", **looks)
    if limits:
        places, seconds = zip(*limits, strict=True)
        looks = {"color": BLACK, "linestyle": "none", "markersize": 11, "markerfacecolor": "none"}
        axes.plot(places, seconds, marker="o", label="stopped at its limit", **looks)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.grid(False, axis="x")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds to plan (logarithmic)")
    figure.legend(loc="outside right upper")
    return figure


def _lengths(rows: Sequence[Row]) -> Figure:
    figure = make_figure(10.0, 0.24 * len(rows) + 1.1)
    moments = ("mean", "skewness", "kurtosis")
    places = range(len(rows))
    for axes, moment in zip(figure.subplots(1, len(moments)), moments, strict=True):
        axes.plot(
            _values(rows, f"{moment}_published"), places, "s", color=VERMILLION, label="published",
            markersize=8, **HOLLOW,
        )  # fmt: skip
        axes.plot(_values(rows, moment), places, "o", color=OURS, label="used here", markersize=4)
        lie_down(axes, [row["dataset"] if moment == "mean" else "" for row in rows])
        axes.grid(True, axis="y")
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_xlabel({"mean": "mean length (tokens)"}.get(moment, f"{moment} (no unit)"))
    explain(figure)
    return figure


def _named(owner: str) -> str:
    return {"LobRA": "LobRA's plan", "ours": "our plan"}.get(owner, owner)


Draw = Callable[[Sequence[Row]], "Figure"]
# picture: the table it needs, and how it is drawn
PICTURES: dict[str, tuple[str, Draw]] = {
    "gpu_seconds": ("methods", _methods),
    "ablation": ("ablation", _ablation),
    "timeline": ("timeline", _timeline),
    "buckets": ("buckets", _buckets),
    "scale_gpus": ("scale_gpus", _scale_gpus),
    "scale_tasks": ("scale_tasks", _scale_tasks),
    "planning_time": ("planning_time", _planning),
    "predicted_measured": ("homogeneous_steps", _predicted),
    "lengths": ("lengths", _lengths),
}
