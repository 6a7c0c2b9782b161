"""Pictures of a run: losses, step times, what the replicas did. Readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
SHADES = ("0.0", "0.45", "0.7")
SMOOTHING = 0.8  # of the loss curves; single steps are drawn faintly behind
FOLDER = "report"


def plot_run(folder: Path, steps: Sequence[dict[str, Any]]) -> list[Path]:
    """Write losses.png, step_time.png and replicas.png under `folder`/report; return them."""
    import matplotlib

    matplotlib.use("Agg")
    layouts = [replica["layout"] for replica in steps[-1]["replicas"]]
    same = [s for s in steps if [replica["layout"] for replica in s["replicas"]] == layouts]
    return [
        _save(folder / FOLDER / "losses.png", _losses(steps)),
        _save(folder / FOLDER / "step_time.png", _step_times(steps)),
        _save(folder / FOLDER / "replicas.png", _replicas(same)),
    ]


def _save(path: Path, figure: Figure) -> Path:
    with atomic_path(path) as draft:
        figure.savefig(draft, dpi=150, format="png")
    return path


def _figure(width: float = 8.0, height: float = 4.5) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _styles() -> cycle[dict[str, str]]:
    return cycle([{"linestyle": line, "color": shade} for shade in SHADES for line in LINES])


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Return the exponential moving average, without the bias of its start."""
    average, norm, result = 0.0, 0.0, []
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(average / norm)
    return result


def _losses(steps: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _figure()
    names = sorted({name for step in steps for name in step["tasks"]})
    for name, style in zip(names, _styles(), strict=False):
        own = [step for step in steps if (step["tasks"].get(name) or {}).get("loss") is not None]
        at = [step["step"] + 1 for step in own]
        values = [step["tasks"][name]["loss"] for step in own]
        axes.plot(at, values, color="0.85", linewidth=0.8, zorder=1)
        axes.plot(at, smoothed(values), label=name, zorder=2, **style)  # type: ignore[arg-type]
        checked = [s for s in own if s["tasks"][name].get("validation_loss") is not None]
        if checked:
            axes.plot(
                [s["step"] + 1 for s in checked],
                [s["tasks"][name]["validation_loss"] for s in checked],
                linestyle="none",
                marker="x",
                color=style["color"],
                label=f"{name}, validation",
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target token)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    return figure


def _step_times(steps: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _figure()
    at = [step["step"] + 1 for step in steps]
    axes.plot(at, [s["step_time_s"] for s in steps], "-", color="0.0", label="measured")
    axes.plot(at, [s["predicted_step_time_s"] for s in steps], "--", color="0.5", label="predicted")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("step time (s)")
    axes.legend()
    return figure


def _replicas(steps: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = _figure(height=max(2.5, 0.35 * len(steps[-1]["replicas"]) + 1.5))
    total_s = sum(step["step_time_s"] for step in steps)
    labels, busy = [], []
    for index, replica in enumerate(steps[-1]["replicas"]):
        labels.append(f"{index} {replica['layout']}")
        busy.append(100 * sum(s["replicas"][index]["busy_s"] for s in steps) / total_s)
    axes.barh(labels, busy, color="0.45", edgecolor="0.0", label="computing")
    axes.barh(
        labels,
        [100 - share for share in busy],
        left=busy,
        color="white",
        edgecolor="0.0",
        hatch="//",
        label="idle, reduction, optimiser",
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the run (%)")
    axes.set_ylabel("replica")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure
