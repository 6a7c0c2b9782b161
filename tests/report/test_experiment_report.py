"""`lobra report` on experiments and simulations: what is shown is what the tables say."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.layout.trace import TRACE_FILE, ReplicaTrace, Slice, trace_text
from lobra.report.experiment_plots import PICTURES
from lobra.report.experiment_report import shown
from lobra.report.experiment_tables import experiments_in, read_experiment
from lobra.report.style import COMPARED, GROUND, OURS

METHOD = {
    "plan": "<2,1>x2",
    "num_gpus": 4,
    "steps": 3,
    "step_time_s": 2.5,
    "gpu_seconds": 10,
    "gpu_seconds_low": 9,
    "gpu_seconds_high": 11,
    "less_than_fused": 0.25,
}
TEXTS = {name: str(value) for name, value in METHOD.items()}


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    folder = tmp_path / "expr"
    folder.mkdir()
    about = {"kind": "simulation", "model": "7B", "num_gpus": 4, "steps": 3}
    (folder / "provenance.json").write_text(json.dumps(about), encoding="utf-8")
    methods = [{"method": f"<b>{name}", **METHOD} for name in ("Task-Fused", "our plan")]
    write_csv(folder / "methods.csv", methods)
    scale = [
        {
            "gpus": gpus,
            "method": method,
            "plan": "<1,1>x1",
            "gpu_seconds": 8,
            "relative": 0.5,
            "published": 0.6,
        }
        for gpus in (16, 32)
        for method in ("Task-Fused", "our plan")
    ]
    write_csv(folder / "scale_gpus.csv", scale)
    return folder


def test_page_is_one_file_with_every_table(
    experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(experiment)]) == 0
    page = (experiment / "report" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;our plan" in page and "<b>our plan" not in page
    assert "25.0 %" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=['\"](?!data:)", page)
    for name in ("gpu_seconds.png", "scale_gpus.png", "methods.csv"):
        assert (experiment / "report" / name).stat().st_size > 100
    assert "Scalability over GPUs" in capsys.readouterr().out


def test_folder_of_experiments_reports_each(experiment: Path) -> None:
    assert experiments_in(experiment.parent) == [experiment]
    assert experiments_in(experiment) == [experiment]
    assert experiments_in(experiment / "none") == []


def test_folder_of_a_simulation_has_the_same_tables(tmp_path: Path) -> None:
    run = {"name": "balanced", "plan": "<1,2>x1", "num_gpus": 2, "steps": 2, "mean_s": 2.0}
    run |= {"gpu_seconds": 4.0, "idle": 0.1, "padding": 0.2, "of_plan": True}
    (tmp_path / "simulation.json").write_text(json.dumps([run]), encoding="utf-8")
    steps = [{"name": "balanced", "step": k, "gpu_seconds": 3.0 + 2 * k} for k in range(2)]
    write_csv(tmp_path / "steps.csv", steps)  # type: ignore[arg-type]
    stages = [[Slice("1 x 64", 0.0, 2.0)], [Slice("bubble", 0.0, 2.0)]]
    replica = ReplicaTrace("replica 0 <1,2>", [Slice("step 0", 0.0, 4.0)], stages)
    (tmp_path / TRACE_FILE).write_text(trace_text([replica]), encoding="utf-8")
    _, tables = read_experiment(tmp_path)
    (method,) = tables["methods"]
    assert method["method"] == "your plan: balanced"
    # two values one from their mean: Student's interval of one degree of freedom
    assert float(method["gpu_seconds_high"]) - 4.0 == pytest.approx(12.7062, abs=1e-3)
    (only,) = tables["timeline"]
    assert (only["layout"], only["what"], float(only["end_s"])) == ("<1,2>", "1 x 64", 2.0)
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report" / "timeline.png").is_file()


def test_what_is_missing_is_named(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "provenance.json" in capsys.readouterr().err
    about = {"kind": "simulation", "complete": False, "command": "bash expr.sh"}
    (experiment / "provenance.json").write_text(json.dumps(about), encoding="utf-8")
    assert main(["report", str(experiment)]) == 0
    assert "NOT FINISHED" in capsys.readouterr().out
    for path in experiment.glob("*.csv"):
        path.unlink()
    assert main(["report", str(experiment)]) == 2
    assert "no table yet; to go on where it stopped: bash expr.sh" in " ".join(
        capsys.readouterr().err.split()
    )


def test_no_bar_stands_on_a_logarithmic_axis(project_root: Path) -> None:
    """Its foot would be anywhere: a length says nothing there."""
    results = project_root / "docs" / "results" / "2026-11-26-experiments"
    seen = set()
    for name in ("expr_7b", "expr_70b"):
        _, tables = read_experiment(results / name)
        for picture, (needs, draw) in PICTURES.items():
            for axes in draw(tables[needs]).axes if needs in tables else ():
                assert not axes.patches or "log" not in (axes.get_xscale(), axes.get_yscale())
                seen.add(picture)
    assert seen == PICTURES.keys() - {"timeline"}


def test_your_plan_has_a_colour_of_its_own() -> None:
    rows = [
        {"method": "Task-Fused", **TEXTS},
        {"method": "your plan: balanced", **TEXTS},
    ]
    figure = PICTURES["gpu_seconds"][1](rows)
    assert [bar.get_facecolor() for bar in figure.axes[0].patches] == [
        to_rgba(COMPARED), to_rgba(OURS)
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "your plan",
        "compared with it",
    ]


def test_the_timeline_shows_lengths() -> None:
    events = [("4 x 512", 0, 6), ("1 x 8192", 6, 6.5), ("bubble", 6.5, 8)]
    rows = [
        {"plan_of": "ours", "replica": "0", "layout": "<1,2>", "what": what,
         "start_s": str(start), "end_s": str(end)}
        for what, start, end in events
    ]  # fmt: skip
    axes, scale = PICTURES["timeline"][1](rows).axes
    assert [text.get_text() for text in axes.texts] == ["4×512", "8192"]
    short, long, bubble = (bar.get_facecolor() for bar in axes.patches)
    assert sum(short[:3]) > sum(long[:3]) and bubble == to_rgba(GROUND)
    assert "padded length" in scale.get_ylabel()


def test_an_interval_is_one_cell_of_the_page(experiment: Path) -> None:
    assert main(["report", str(experiment)]) == 0
    page = (experiment / "report" / "report.html").read_text(encoding="utf-8")
    assert "10 [9, 11]" in page and "GPU-s low" not in page


def test_broken_files_are_a_users_mistake(experiment: Path) -> None:
    (experiment / "provenance.json").write_text("[1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"provenance\.json: line 1, column 3: not valid JSON"):
        read_experiment(experiment)
    assert main(["report", str(experiment)]) == 2


@pytest.mark.parametrize(
    ("column", "text", "expected"),
    [
        ("less_than_fused", "0.4631", "46.3 %"),
        ("less_than_fused", "-0.00001", "0.0 %"),
        ("padding", "0.05", "5.0 %"),
        ("stopped", "True", "yes"),
        ("num_gpus", "16", "16"),
        ("gpu_seconds", "8178.4721", "8,178.5"),
        ("step_time_s", "10.81204", "10.81"),
        ("plan", "<1,8>x1", "<1,8>x1"),
        ("published_s", "over 3600", "over 3600"),
    ],
)
def test_values_read_as_a_person_writes_them(column: str, text: str, expected: str) -> None:
    assert shown(column, text) == expected
