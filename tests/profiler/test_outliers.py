"""Rows that stick out are found, measured again at most twice, and become a median."""

from __future__ import annotations

from pathlib import Path

import pytest

from lobra.profiler.effort import THOROUGH
from lobra.profiler.grid import time_grid
from lobra.profiler.outliers import doubtful_shapes, record_attempt
from lobra.profiler.profiles import TIME_COLUMNS, load_time_profile
from lobra.profiler.sidecar import read_meta
from lobra.profiler.sweep_file import open_sweep
from lobra.profiler.sweep_rows import SweepFile

GRID = time_grid(1024)


def time_ms(b: int, s: int) -> float:
    return 0.3 + 0.002 * b * s + 1e-6 * b * s * s


def opened(path: Path) -> SweepFile:
    return open_sweep(path, TIME_COLUMNS, 3, {"model": "tiny"}, kind="measured")


def filled(path: Path, wrong: dict[tuple[int, int], float], spread: float = 0.02) -> SweepFile:
    file = opened(path)
    for b, s in GRID:
        value = time_ms(b, s) * wrong.get((b, s), 1.0)
        file.add((2, s, b, value), {"spread": spread, "repeats": 3})
    return file


def test_clean_rows_are_believed(tmp_path: Path) -> None:
    assert doubtful_shapes(filled(tmp_path / "t.csv", {}), 2) == set()


@pytest.mark.parametrize("shape", [GRID[3], GRID[len(GRID) // 2], GRID[-2]])
def test_a_row_twice_its_neighbours_is_found(tmp_path: Path, shape: tuple[int, int]) -> None:
    file = filled(tmp_path / "t.csv", {shape: 2.0})
    assert shape in doubtful_shapes(file, 2)
    assert doubtful_shapes(file, 1) == set(), "another tp"


def test_unsteady_rows_are_found_but_no_more_than_half(tmp_path: Path) -> None:
    found = doubtful_shapes(filled(tmp_path / "t.csv", {}, spread=0.9), 2)
    assert len(found) == len(GRID) // 2


def test_attempts_end_and_leave_the_median(tmp_path: Path) -> None:
    shape = GRID[len(GRID) // 2]
    b, s = shape
    file = filled(tmp_path / "t.csv", {shape: 2.0})
    for attempt in range(THOROUGH.attempts - 1):
        assert shape in doubtful_shapes(file, 2) or attempt > 0
        record_attempt(file, (2, s, b), (), time_ms(b, s), {"spread": 0.01, "repeats": 5})
        file = opened(file.path)
    assert shape not in doubtful_shapes(file, 2)
    profile = load_time_profile(file.path)
    row = (profile.mbs == b) & (profile.seq_len == s)
    assert profile.time_ms[row] == pytest.approx(time_ms(b, s), rel=1e-5)
    assert len(profile) == len(GRID)
    assert len(read_meta(file.path)["rows"][f"2,{s},{b}"]["attempts"]) == THOROUGH.attempts
