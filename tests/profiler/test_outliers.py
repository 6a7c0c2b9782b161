"""Rows that stick out are found, measured again at most twice, and become a median."""

from __future__ import annotations

from pathlib import Path

import pytest

from lobra.profiler.layer_time_rank import _record
from lobra.profiler.outliers import MAX_ATTEMPTS, doubtful_points
from lobra.profiler.points import time_points
from lobra.profiler.profiles import TIME_COLUMNS, load_time_profile, read_meta
from lobra.profiler.sweep_file import SweepFile, open_sweep

POINTS = time_points(1024)


def time_ms(b: int, s: int) -> float:
    return 0.3 + 0.002 * b * s + 1e-6 * b * s * s


def opened(path: Path) -> SweepFile:
    return open_sweep(path, TIME_COLUMNS, 3, {"model": "tiny"}, kind="measured")


def filled(path: Path, wrong: dict[tuple[int, int], float], spread: float = 0.02) -> SweepFile:
    file = opened(path)
    for b, s in POINTS:
        value = time_ms(b, s) * wrong.get((b, s), 1.0)
        file.add((2, s, b, value), {"spread": spread, "repeats": 3})
    return file


def test_clean_rows_are_believed(tmp_path: Path) -> None:
    assert doubtful_points(filled(tmp_path / "t.csv", {}), 2) == set()


@pytest.mark.parametrize("point", [POINTS[3], POINTS[len(POINTS) // 2], POINTS[-2]])
def test_a_row_twice_its_neighbours_is_found(tmp_path: Path, point: tuple[int, int]) -> None:
    file = filled(tmp_path / "t.csv", {point: 2.0})
    assert point in doubtful_points(file, 2)
    assert doubtful_points(file, 1) == set(), "another tp"


def test_unsteady_rows_are_found_but_no_more_than_half(tmp_path: Path) -> None:
    found = doubtful_points(filled(tmp_path / "t.csv", {}, spread=0.9), 2)
    assert len(found) == len(POINTS) // 2


def test_attempts_end_and_leave_the_median(tmp_path: Path) -> None:
    point = POINTS[len(POINTS) // 2]
    b, s = point
    file = filled(tmp_path / "t.csv", {point: 2.0})
    for attempt in range(MAX_ATTEMPTS - 1):
        assert point in doubtful_points(file, 2) or attempt > 0
        _record(file, (2, s, b), (), time_ms(b, s), {"spread": 0.01, "repeats": 5})
        file = opened(file.path)
    assert point not in doubtful_points(file, 2)
    profile = load_time_profile(file.path)
    row = (profile.mbs == b) & (profile.seq_len == s)
    assert profile.time_ms[row] == pytest.approx(time_ms(b, s), rel=1e-5)
    assert len(profile) == len(POINTS)
    assert len(read_meta(file.path)["rows"][f"2,{s},{b}"]["attempts"]) == MAX_ATTEMPTS
