"""The page of reproduced experiments says what the committed tables say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.cells import code_digest
from experiments.page import write_page
from experiments.published import PLANNING_TIME_S, SETUPS
from experiments.reproduction import (
    PAGE,
    RESULTS,
    collect,
    made_with_other_code,
    page,
    read_results,
)
from lobra.common.errors import ConfigError


def test_the_page_is_what_the_committed_tables_give(project_root: Path, tmp_path: Path) -> None:
    text = (project_root / PAGE).read_text(encoding="utf-8")
    tables = read_results(project_root / RESULTS)
    assert write_page(tables, str(RESULTS.relative_to("docs"))) == text
    assert len(text.split()) < 2500
    page(results=project_root / RESULTS, page=tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8").splitlines()[-8:] == (
        text.splitlines()[-8:]
    )
    del tables["expr_32b"], tables["baselines"]
    with pytest.raises(ConfigError, match="here: no tables of expr_32b, baselines"):
        write_page(tables, "here")


def test_packed_methods_are_explained_where_there_are_any(project_root: Path) -> None:
    tables = read_results(project_root / RESULTS)
    text = write_page(tables, "here")
    assert "**Packed**" in text and len(text.split()) < 2500
    assert "| 7B | packed | 56.1 |" in text and "| packed, a quarter | 101 | 999 |" in text
    for own in tables.values():
        if "methods" in own:
            own["methods"] = [row for row in own["methods"] if "packed" not in row["method"]]
    assert "**Packed**" not in write_page(tables, "here")


def test_committed_results_were_made_by_one_code(project_root: Path) -> None:
    tables = read_results(project_root / RESULTS)
    digests = {own["provenance"][0]["code"] for own in tables.values() if "provenance" in own}
    assert len(digests) == 1
    assert made_with_other_code({"a": {"provenance": [{"code": code_digest()}]}}) == []
    assert made_with_other_code({"a": {"provenance": [{"code": "0"}]}}) == ["a"]


def test_the_committed_tables_cover_what_was_published(project_root: Path) -> None:
    tables = read_results(project_root / RESULTS)
    for model, setup in SETUPS.items():
        own = tables[f"expr_{model.lower()}"]
        assert {row["task"] for row in own["sequential"]} == set(setup.sequential)
        assert all(int(row["steps"]) >= 50 for row in own["methods"])
    planning = tables["expr_70b"]["planning_time"]
    assert {int(row["num_gpus"]) for row in planning} >= set(PLANNING_TIME_S)


def test_tables_are_collected_and_a_missing_one_is_named(tmp_path: Path) -> None:
    source = tmp_path / "exp_result" / "expr_7b"
    source.mkdir(parents=True)
    (source / "profile").mkdir()
    (source / "report").mkdir()
    for name in ("methods.csv", "timeline.csv", "profile/max_tokens_7B_6tasks.csv"):
        (source / name).write_text("a,b\n1,2\n", encoding="utf-8")
    (source / "report" / "gpu_seconds.png").write_bytes(b"picture")
    about = {"kind": "simulation", "complete": True, "inputs": {"main": {"code": "abc"}}}
    (source / "provenance.json").write_text(json.dumps(about), encoding="utf-8")
    half = tmp_path / "exp_result" / "expr_half"  # a run that was not finished
    half.mkdir()
    text = json.dumps({**about, "complete": False})
    (half / "provenance.json").write_text(text, encoding="utf-8")
    (tmp_path / "kept" / "expr_7b").mkdir(parents=True)
    (tmp_path / "kept" / "expr_7b" / "old.csv").write_text("a\n", encoding="utf-8")
    left_out = collect(tmp_path / "exp_result", tmp_path / "kept")
    assert left_out == ["expr_half: not a simulation that was finished"]
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*.*")) == [
        "gpu_seconds_7b.png",
        "max_tokens_7B_6tasks.csv",
        "methods.csv",
        "provenance.json",
    ]
    found = read_results(tmp_path / "kept")["expr_7b"]
    assert found["methods"] == [{"a": "1", "b": "2"}]
    assert found["provenance"][0]["code"] == "abc"
    with pytest.raises(ConfigError, match="no tables of experiments"):
        page(results=tmp_path / "none", page=tmp_path / "p.md")
