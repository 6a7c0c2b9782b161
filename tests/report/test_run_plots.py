"""Pictures of runs show what happened: every task, validation, resumes and changes of plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from lobra.report.run_plans import PlanPart
from lobra.report.run_plots import (
    PLAN_CHANGED,
    RESUMED,
    SMOOTHING,
    losses,
    plot_run,
    replicas,
    smoothed,
    step_times,
    timeline,
)
from lobra.report.run_summary import run_parts
from lobra.report.style import STYLE
from lobra.trainer.run_config import read_run_config
from tests.report.runs import VALIDATE_EVERY, write_run

LONG = "a_customer_s_very_long_task_name_of_2026_11_26_v7"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[PlanPart]:
    """Return twelve tasks' run, on two plans."""
    folder = tmp_path_factory.mktemp("runs") / "twelve"
    tasks = [*(f"task_{number}" for number in range(11)), LONG]
    plans = {0: [(1, 1, 1)], 50: [(14, 1, 1), (1, 2, 1)]}
    return run_parts(write_run(folder, tasks, 80, plans))


@pytest.fixture(autouse=True)
def style() -> Iterator[None]:
    with rc_context(STYLE):
        yield


def only_two_tasks(step: dict[str, Any]) -> dict[str, Any]:
    return {**step, "tasks": {name: step["tasks"][name] for name in ("task_0", "task_1")}}


def panels(figure: Figure) -> dict[str, list[str]]:
    """Return which curves there are in every panel, by its title."""
    return {
        axes.get_title(loc="left") or axes.get_title(): axes.get_legend_handles_labels()[1]
        for axes in figure.axes
    }


def test_each_task_has_a_panel_with_its_validation(parts: list[PlanPart]) -> None:
    figure = losses(parts)
    shown = panels(figure)
    assert len(shown) == 12 and "a_customer_s_v…2026_11_26_v7" in shown
    for axes, curves in zip(figure.axes, shown.values(), strict=True):
        assert curves[:2] == ["training", f"smoothed (exponential average, {SMOOTHING})"]
        assert curves[2] == "validation"
        training, _, validation = axes.lines[:3]
        assert len(training.get_xdata()) == 80
        assert list(validation.get_xdata()) == list(range(VALIDATE_EVERY, 81, VALIDATE_EVERY))


def test_resumes_and_changes_of_plan_are_marked_apart(parts: list[PlanPart]) -> None:
    for figure in (losses(parts, [20, 21, 50]), step_times(parts, [20, 21, 50])):
        lines = figure.axes[0].lines
        for looks, at in ((PLAN_CHANGED, [50.5]), (RESUMED, [20.5, 21.5])):
            own = [line for line in lines if line.get_color() == looks["color"]]
            assert [line.get_xdata()[0] for line in own] == at
            assert {line.get_linestyle() for line in own} == {looks["linestyle"]}
    below = figure.axes[0].get_xlabel()
    assert "plan 2, steps 51-80: <1,1>x14 <2,1>x1" in below


def test_each_plan_has_a_panel_of_its_replicas(parts: list[PlanPart]) -> None:
    figure = replicas(parts)
    assert [len(axes.get_yticks()) for axes in figure.axes] == [1, 15]
    for axes, part in zip(figure.axes, parts, strict=True):
        widths = [bar.get_width() for bar in axes.patches][len(part.layouts) :]
        step_time_s = sum(step["step_time_s"] for step in part.steps)
        busy_s = sum(step["replicas"][0]["busy_s"] for step in part.steps)
        assert widths[0] == pytest.approx(100 * busy_s / step_time_s)
    many = [PlanPart(1, "many", 200, tuple(parts[1].steps))]
    assert len(replicas(many).axes) == 1


def test_the_time_line_has_the_last_steps_as_they_were(parts: list[PlanPart]) -> None:
    part = parts[1]
    (axes,) = timeline(part).axes
    assert [text.get_text() for text in axes.texts] == [str(step) for step in range(69, 81)]
    bars = axes.patches[len(part.layouts) :: len(part.layouts)]  # of replica 0
    end_s = 0.0
    for bar, step in zip(bars, part.steps[-12:], strict=True):
        assert bar.get_x() == pytest.approx(end_s)
        assert bar.get_width() == pytest.approx(step["replicas"][0]["busy_s"])
        end_s += step["step_time_s"]
    assert axes.get_xlim() == pytest.approx((0, end_s))


def test_nothing_of_a_picture_is_cut_off(parts: list[PlanPart]) -> None:
    """Every text lies within the picture, every point of a curve within its panel."""
    two = [replace(part, steps=tuple(map(only_two_tasks, part.steps))) for part in parts]
    for figure in (
        *(losses(parts, [20]), losses(two, [20]), step_times(parts, [20])),
        *(replicas(parts), timeline(parts[1])),
    ):
        figure.draw_without_rendering()
        width, height = figure.canvas.get_width_height()
        for axes in (*figure.legends, *figure.axes):
            box = axes.get_tightbbox()
            assert box is not None
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1
        for axes in figure.axes:
            (low, high), (left, right) = sorted(axes.get_ylim()), sorted(axes.get_xlim())
            for line in axes.lines:
                if line.get_transform() == axes.transData:
                    x, y = line.get_data()
                    assert left < min(x) and max(x) < right and low <= min(y) and max(y) < high


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_few_steps_has_pictures_too(tmp_path: Path, steps: int) -> None:
    folder = write_run(tmp_path / "run", ["only"], steps)
    written = plot_run(folder, run_parts(folder), read_run_config(folder).known_resumes)
    names = ["losses.png", "step_time.png", "replicas.png", "timeline.png"]
    assert [path.name for path in written] == names
    assert all(path.stat().st_size > 1000 for path in written)


def test_smoothing_is_an_average_without_the_bias_of_its_start() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    first, second = smoothed([1.0, 2.0], weight=0.5)
    assert (first, second) == pytest.approx((1.0, (0.25 * 1.0 + 0.5 * 2.0) / 0.75))
