"""Pictures of experiments and simulations, from their tables. Readable without colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Row = Mapping[str, str]
Tables = Mapping[str, Sequence[Row]]
SCALE_STYLES: Mapping[str, Mapping[str, Any]] = {  # drawn in this order, ours on top
    "Task-Fused, published": {"color": "0.45", "linestyle": (0, (1, 3)), "marker": "P"},
    "LobRA, published": {"color": "0.45", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "X"},
    "Task-Fused": {"color": "0.0", "linestyle": "-", "marker": "o"},
    "Task-Fused, our dispatch": {"color": "0.35", "linestyle": "--", "marker": "s"},
    "Task-Fused, our dispatch, 16 dynamic buckets": {
        **{"color": "0.55", "linestyle": "-.", "marker": "^"},
    },
    "LobRA's plan": {"color": "0.2", "linestyle": ":", "marker": "D", "markersize": 9},
    "our plan": {
        **{"color": "0.5", "linestyle": "-", "marker": "v", "markersize": 8},
        **{"markerfacecolor": "0.75", "markeredgecolor": "1.0", "markeredgewidth": 1.2},
    },
}
PUBLISHED_CURVES = {"Task-Fused, published": "Task-Fused", "LobRA, published": "our plan"}
STYLES: tuple[Mapping[str, Any], ...] = (
    {"color": "0.0", "linestyle": "-", "marker": "o"},
    {"color": "0.35", "linestyle": "--", "marker": "s"},
    {"color": "0.55", "linestyle": "-.", "marker": "^"},
    {"color": "0.2", "linestyle": ":", "marker": "D"},
    {"color": "0.5", "linestyle": "-", "marker": "v"},
    {"color": "0.65", "linestyle": "--", "marker": "P"},
)
FILLS = ("0.25", "0.6", "0.85", "1.0")
HATCHES = ("", "//", "..", "xx")
BARS = (
    ("0.25", ""),
    ("0.65", ""),
    ("0.85", "//"),
    ("1.0", ".."),
    ("0.85", "xx"),
    ("1.0", "\\\\"),
)
MANY_REPLICAS = 24  # beyond which a timeline names only some of its rows


def plot_tables(tables: Tables, folder: Path) -> list[Path]:
    """Write every picture the tables have data for as PNG into ``folder``; return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for name, (needs, draw) in PICTURES.items():
        if tables.get(needs):
            figure = draw(tables[needs])
            path = folder / f"{name}.png"
            with atomic_path(path) as draft:
                figure.savefig(draft, dpi=150, format="png")
            paths.append(path)
    return paths


def _figure(width: float = 8.0, height: float = 4.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, columns, index + 1) for index in range(columns)]


def _values(rows: Sequence[Row], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


def _groups(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def _errors(rows: Sequence[Row], name: str) -> list[list[float]]:
    return [
        [float(row[name]) - float(row[f"{name}_low"]) for row in rows],
        [float(row[f"{name}_high"]) - float(row[name]) for row in rows],
    ]


def _methods(rows: Sequence[Row]) -> Figure:
    figure, (axes,) = _figure(height=0.45 * len(rows) + 1.2)
    shades = ["0.25" if row["method"].startswith(("our", "packed")) else "0.7" for row in rows]
    names = [row["method"] for row in rows]
    axes.barh(
        names,
        _values(rows, "gpu_seconds"),
        xerr=_errors(rows, "gpu_seconds"),
        color=shades,
        edgecolor="0.0",
        capsize=3,
        error_kw={"ecolor": "0.0"},
    )
    longest = max(_values(rows, "gpu_seconds_high"))
    for index, row in enumerate(rows):
        mean = f" {float(row['gpu_seconds']):,.0f}"
        axes.text(float(row["gpu_seconds_high"]) + 0.01 * longest, index, mean, va="center")
    axes.set_xlim(0, 1.15 * longest)
    axes.invert_yaxis()
    axes.set_xlabel("GPU-seconds per step (mean and 95 % interval)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _ablation(rows: Sequence[Row]) -> Figure:
    figure, (axes,) = _figure(height=0.55 * len(rows) + 1.4)
    owners = [owner for owner in _groups(rows, "plan_of") if owner != "homogeneous"]
    labels, bars = [], []
    for row in rows:
        owner = row["plan_of"]
        shade = 2 if owner == "homogeneous" else owners.index(owner)
        who = "Task-Fused" if owner == "homogeneous" else _named(owner)
        buckets = f" ({row['buckets']})" if row.get("buckets") else ""
        labels.append(f"{who}\n{row['rung']}{buckets}")
        bars.append((float(row["gpu_seconds"]), FILLS[shade], HATCHES[shade]))
    for index, (value, fill, hatch) in enumerate(bars):
        low, high = float(rows[index]["gpu_seconds_low"]), float(rows[index]["gpu_seconds_high"])
        axes.barh(
            index,
            value,
            color=fill,
            hatch=hatch,
            edgecolor="0.0",
            xerr=[[value - low], [high - value]],
            capsize=3,
            error_kw={"ecolor": "0.0"},
        )
        saved = 100 * float(rows[index]["less_than_fused"])
        text = f"{value:,.0f}" + (f" ({-saved:+.1f} %)" if index else "")
        axes.text(high * 1.01, index, f" {text}", va="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(_values(rows, "gpu_seconds_high")))
    axes.set_xlabel("GPU-seconds per step (in brackets: against the first)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _buckets(rows: Sequence[Row]) -> Figure:
    figure, (left, right) = _figure(width=10.0, columns=2)
    for (owner, own), style in zip(_groups(rows, "plan_of").items(), STYLES, strict=False):
        numbers = _values(own, "buckets")
        step_s = _values(own, "step_time_s")
        right.errorbar(
            numbers, step_s, yerr=_errors_s(own), label=_named(owner), capsize=2, **style
        )
    own = next(iter(_groups(rows, "plan_of").values()))
    shares = [100 * value for value in _values(own, "padding")]
    left.plot(_values(own, "buckets"), shares, **STYLES[0])
    left.set_ylabel("padding (% of computed tokens)")
    right.set_ylabel("step time (s), mean and 95 % interval")
    right.legend()
    for axes in (left, right):
        axes.set_xlabel("buckets of a step, at most")
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
    return figure


def _errors_s(rows: Sequence[Row]) -> list[list[float]]:
    return [
        [float(row["step_time_s"]) - float(row["step_time_low_s"]) for row in rows],
        [float(row["step_time_high_s"]) - float(row["step_time_s"]) for row in rows],
    ]


def _timeline(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plans = _groups(rows, "plan_of")
    counts = [len(_groups(own, "replica")) for own in plans.values()]
    heights = [max(2.0, min(6.0, 0.3 * count + 0.9)) for count in counts]
    figure = Figure(figsize=(9.5, sum(heights) + 0.6), layout="constrained")
    parts = figure.subplots(len(plans), 1, height_ratios=heights, squeeze=False, sharex=True)
    for axes, (owner, own) in zip(parts[:, 0], plans.items(), strict=True):
        replicas = _groups(own, "replica")
        for place, events in enumerate(replicas.values()):
            for number, event in enumerate(events):
                start, end = float(event["start_s"]), float(event["end_s"])
                bubble = event["what"] == "bubble"
                axes.broken_barh(
                    [(start, end - start)],
                    (place - 0.4, 0.8),
                    facecolor="white" if bubble else ("0.55", "0.75")[number % 2],
                    edgecolor="0.0",
                    linewidth=0.4,
                    hatch="////" if bubble else "",
                )
        every = max(1, -(-len(replicas) // MANY_REPLICAS))
        ticks = list(range(0, len(replicas), every))
        names = [f"{key} {events[0]['layout']}" for key, events in replicas.items()]
        axes.set_yticks(ticks, [names[tick] for tick in ticks])
        axes.invert_yaxis()
        axes.set_title(_named(owner), loc="left")
        axes.set_ylabel("replica")
    parts[-1, 0].set_xlabel("time in the first sampled step (s)")
    handles = [
        Patch(facecolor="0.6", edgecolor="0.0", label="micro-batches"),
        Patch(facecolor="white", edgecolor="0.0", hatch="////", label="pipeline's bubble"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _scale(rows: Sequence[Row], column: str, label: str) -> Figure:
    figure, (axes,) = _figure(width=9.5)
    methods = _groups(rows, "method")
    for name, style in SCALE_STYLES.items():  # other methods are hardly apart: in the table
        looks = dict(style)
        if method := PUBLISHED_CURVES.get(name):
            own = [row for row in methods.get(method, []) if row.get("published")]
            value = "published"
            looks["markerfacecolor"] = "white"
        else:
            own, value = methods.get(name, []), "relative"
        if own:
            axes.plot(_values(own, column), _values(own, value), label=name, **looks)
    ticks = sorted({float(row[column]) for row in rows})
    if ticks[-1] / ticks[0] > 8:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("GPU-seconds per step,\nrelative to Task-Fused at the first point")
    axes.grid(color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return figure


def _scale_gpus(rows: Sequence[Row]) -> Figure:
    return _scale(rows, "gpus", "GPUs (4 tasks)")


def _scale_tasks(rows: Sequence[Row]) -> Figure:
    return _scale(rows, "tasks", "tasks (64 GPUs)")


def _predicted(rows: Sequence[Row]) -> Figure:
    figure, (axes,) = _figure(height=4.0)
    places = range(len(rows))
    axes.bar(
        [place - 0.2 for place in places],
        _values(rows, "measured_lobra_s"),
        0.4,
        color="0.85",
        edgecolor="0.0",
        hatch="//",
        label="measured (published)",
    )
    predicted = _values(rows, "predicted_s")
    axes.bar(
        [place + 0.2 for place in places],
        predicted,
        0.4,
        color="0.35",
        edgecolor="0.0",
        label="predicted by our cost model",
    )
    for place, row in zip(places, rows, strict=True):
        tallest = max(float(row["measured_lobra_s"]), float(row["predicted_s"]))
        axes.text(place, 1.05 * tallest, f"{100 * float(row['difference']):+.1f} %", ha="center")
    labels = [f"{row['plan']}\n{int(row['seq_len']) // 1024}K tokens" for row in rows]
    axes.set_xticks(list(places), labels, fontsize="small")
    axes.set_yscale("log")
    axes.set_ylim(0.5 * min(predicted), 2.2 * max(predicted))
    _plain_ticks(axes.yaxis)
    axes.set_ylabel("step time (s, logarithmic)")
    axes.legend(loc="upper left", frameon=False)
    return figure


def _planning(rows: Sequence[Row]) -> Figure:
    figure, (axes,) = _figure(width=9.5)
    if any(row.get("tasks") for row in rows):  # several task sets: those of the scalability
        fewest = min(int(row["tasks"]) for row in rows)
        rows = [row for row in rows if int(row["tasks"]) == fewest]
    found = [row for row in rows if row["plan"]]
    sizes = sorted({int(row["num_gpus"]) for row in rows})
    patterns = list(_groups(found, "pattern"))
    width = 0.8 / len(patterns)
    stopped: list[tuple[float, float]] = []
    for index, pattern in enumerate(patterns):
        own = [row for row in found if row["pattern"] == pattern]
        at = [sizes.index(int(row["num_gpus"])) + (index + 0.5) * width - 0.4 for row in own]
        axes.bar(
            at,
            _values(own, "seconds"),
            width,
            label=pattern,
            edgecolor="0.0",
            color=BARS[index % len(BARS)][0],
            hatch=BARS[index % len(BARS)][1],
        )
        stopped += [
            (place, float(row["seconds"]))
            for place, row in zip(at, own, strict=True)
            if row.get("stopped") == "True"
        ]
    if stopped:
        axes.plot(
            [place for place, _ in stopped],
            [1.25 * seconds for _, seconds in stopped],
            linestyle="none",
            marker="2",
            color="0.0",
            label="stopped at its limit",
        )
    published = [
        row
        for row in rows
        if row.get("published_s") not in ("", None, "over 3600") and row["pattern"] in patterns
    ]
    for number, (pattern, own) in enumerate(_groups(published, "pattern").items()):
        place = (patterns.index(pattern) + 0.5) * width - 0.4  # on the pattern's own bar
        axes.plot(
            [sizes.index(int(row["num_gpus"])) + place for row in own],
            _values(own, "published_s"),
            linestyle="none",
            marker="Dsov"[number % 4],
            markerfacecolor="white",
            markeredgecolor="0.0",
            zorder=3,
            label=f"{pattern}, published",
        )
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(0.1, 0.5 * min(_values(found, "seconds"))))
    _plain_ticks(axes.yaxis)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("seconds to plan (logarithmic)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return figure


def _lengths(rows: Sequence[Row]) -> Figure:
    figure, parts = _figure(width=10.0, height=4.0, columns=3)
    names = [row["dataset"] for row in rows]
    for axes, moment in zip(parts, ("mean", "skewness", "kurtosis"), strict=True):
        places = range(len(rows))
        axes.plot(
            _values(rows, f"{moment}_published"),
            list(places),
            linestyle="none",
            marker="o",
            markersize=9,
            markerfacecolor="white",
            markeredgecolor="0.0",
            label="published",
        )
        used = {"marker": "x", "color": "0.0", "label": "used here"}
        axes.plot(_values(rows, moment), list(places), linestyle="none", **used)  # type: ignore[arg-type]
        axes.set_yticks(list(places), names if moment == "mean" else [""] * len(rows))
        axes.invert_yaxis()
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
        axes.set_xlabel({"mean": "mean length (tokens)"}.get(moment, f"{moment} (no unit)"))
        axes.grid(color="0.9")
    handles, labels = parts[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, at most three to a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first, last = sorted(axis.get_view_interval())
    narrow = last / first < 150
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


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
