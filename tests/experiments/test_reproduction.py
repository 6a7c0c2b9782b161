"""The page of reproduced experiments says what the committed tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.published import PLANNING_TIME_S, SETUPS
from experiments.reproduction import PAGE, RESULTS, TABLES, collect, fill, main, read_results
from tasks.errors import ConfigError


def test_every_table_of_the_page_is_made_from_the_committed_tables(project_root: Path) -> None:
    page = (project_root / PAGE).read_text(encoding="utf-8")
    assert fill(page, read_results(project_root / RESULTS)) == page
    for name in TABLES:
        assert f"<!-- begin {name} -->\n|" in page, name


def test_the_committed_tables_cover_what_was_published(project_root: Path) -> None:
    tables = read_results(project_root / RESULTS)
    for model, setup in SETUPS.items():
        own = tables[f"expr_{model.lower()}"]
        assert {row["task"] for row in own["sequential"]} == set(setup.sequential)
        assert all(int(row["steps"]) >= 50 for row in own["methods"])
    planning = tables["expr_70b"]["planning_time"]
    assert {int(row["num_gpus"]) for row in planning} >= set(PLANNING_TIME_S)


def test_tables_are_collected_and_a_missing_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "exp_result" / "expr_7b"
    source.mkdir(parents=True)
    for name in ("methods.csv", "timeline.csv", "provenance.json"):
        (source / name).write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "exp_result" / "expr_half").mkdir()  # a run that was not finished
    collect(tmp_path / "exp_result", tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*.*")) == [
        "methods.csv",
        "provenance.json",
    ]
    assert read_results(tmp_path / "kept") == {"expr_7b": {"methods": [{"a": "1", "b": "2"}]}}
    with pytest.raises(ConfigError, match="table nonsense: unknown"):
        fill("<!-- begin nonsense -->\n<!-- end nonsense -->", {})
    assert main(["--results", str(tmp_path / "none"), "--page", str(tmp_path / "p.md")]) == 2
    assert "no such page" in capsys.readouterr().err
