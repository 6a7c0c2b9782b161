"""The registry of benchmarks: every driver is entered, its rows are printed and kept."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import SUBJECTS, keep, main, printed

NO_SUBJECTS = {
    "__main__",
    "baselines_ranks",
    "failed",
    "gpu_packages",
    "gpu_report",
    "packed_planning",
}


def test_every_module_is_a_subject_with_a_documented_driver(project_root: Path) -> None:
    modules = {path.stem: path for path in (project_root / "benchmarks").glob("*.py")}
    assert set(modules) - NO_SUBJECTS == set(SUBJECTS)
    for subject in SUBJECTS:
        body = ast.parse(modules[subject].read_text(encoding="utf-8")).body
        drivers = [f for f in body if isinstance(f, ast.FunctionDef) and f.name == subject]
        assert [bool(ast.get_docstring(driver)) for driver in drivers] == [True], subject
        assert ast.unparse(drivers[0].returns).startswith("Iterator["), "it yields rows"


def test_rows_are_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 23 facts about LobRA's deployments agree with the memory estimator."""
    path = tmp_path / "rows.json"
    assert main(["profiler_deployments", "--json", str(path)]) == 0
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["command"].startswith("profiler_deployments")
    assert [row["agrees"] for row in kept["rows"]] == [True] * 23
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 23


def test_other_columns_begin_another_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"a": 1, "b": 0.123456}, {"a": 54321.9, "b": None, "details": [1]}, {"c": "x"}]
    assert list(printed(rows)) == rows
    assert capsys.readouterr().out == (
        "\n| a | b |\n| --- | --- |\n| 1 | 0.1235 |\n| 54,322 | - |\n\n| c |\n| --- |\n| x |\n"
    )


def test_a_mistake_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiler_cost", str(tmp_path / "none.csv")]) == 2
    assert "no such profile" in capsys.readouterr().err


def test_what_was_measured_is_kept_however_it_ends(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, int]]:
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep(rows(), "subject", tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"] == [{"a": 1}]
