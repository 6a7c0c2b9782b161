"""Pictures of a run: losses, step times, what the replicas did. Readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.common.files import atomic_path
from lobra.report.run_plans import PlanPart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", "-.", ":")
SHADES = ("0.0", "0.45", "0.7")
SMOOTHING = 0.8  # of the loss curves; single steps are drawn faintly behind
FOLDER = "report"


def plot_run(folder: Path, parts: Sequence[PlanPart]) -> list[Path]:
    """Write losses.png, step_time.png and replicas.png under `folder`/report; return them."""
    import matplotlib

    matplotlib.use("Agg")
    return [
        _save(folder / FOLDER / "losses.png", losses(parts)),
        _save(folder / FOLDER / "step_time.png", step_times(parts)),
        _save(folder / FOLDER / "replicas.png", replicas(parts)),
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


def _mark_plans(axes: Axes, parts: Sequence[PlanPart]) -> None:
    """Draw a line where the run went on with another plan, and name the plans."""
    if len(parts) < 2:
        return
    for part in parts:
        first = part.steps[0]["step"] + 1
        if part.number > 1:
            axes.axvline(first - 0.5, color="0.6", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"plan {part.number}: {part.plan}",
            (first - 0.4, 1.0),
            xycoords=("data", "axes fraction"),
            rotation=90,
            va="top",
            fontsize="x-small",
            color="0.3",
        )


def losses(parts: Sequence[PlanPart]) -> Figure:
    """Return every task's loss over the steps."""
    figure, axes = _figure()
    steps = [step for part in parts for step in part.steps]
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
    _mark_plans(axes, parts)
    return figure


def step_times(parts: Sequence[PlanPart]) -> Figure:
    """Return measured and predicted step times."""
    figure, axes = _figure()
    steps = [step for part in parts for step in part.steps]
    at = [step["step"] + 1 for step in steps]
    axes.plot(at, [s["step_time_s"] for s in steps], "-", color="0.0", label="measured")
    axes.plot(at, [s["predicted_step_time_s"] for s in steps], "--", color="0.5", label="predicted")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("step time (s)")
    axes.legend()
    _mark_plans(axes, parts)
    return figure


def replicas(parts: Sequence[PlanPart]) -> Figure:
    """Return what part of a plan's steps each of its replicas computed, plan by plan."""
    number = sum(len(part.layouts) for part in parts)
    figure, axes = _figure(height=max(2.5, 0.35 * number + 1.5))
    labels, busy = [], []
    for part in parts:
        total_s = sum(step["step_time_s"] for step in part.steps)
        of_plan = f"plan {part.number} ({part.span}): " if len(parts) > 1 else ""
        for index, layout in enumerate(part.layouts):
            labels.append(f"{of_plan}{index} {layout}")
            own = sum(step["replicas"][index]["busy_s"] for step in part.steps)
            busy.append(100 * own / total_s)
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
    axes.set_xlabel("share of the steps' time (%)")
    axes.set_ylabel("replica")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return figure
