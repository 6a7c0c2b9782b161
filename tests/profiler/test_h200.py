"""The estimator against an H200 (`tests/assets/h200`), which its efficiency is calibrated on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lobra.layout.shapes import NAMED_SHAPES, read_shape
from lobra.profiler.accelerators import load_tables
from lobra.profiler.calibration import calibrate, layer_error
from lobra.profiler.estimate_time import Workload, base_ms, head_ms, layer_ms
from lobra.profiler.head import HeadProfile, load_head_profile
from lobra.profiler.profiles import TimeProfile, load_time_profile

TABLES = load_tables()
GENERAL = TABLES.accelerator("A100-40GB").efficiency


@pytest.fixture(scope="module")
def folder(project_root: Path) -> Path:
    return project_root / "tests/assets/h200"


@pytest.fixture(scope="module")
def work(folder: Path) -> Workload:
    return Workload(read_shape(folder), TABLES.accelerator("H200"), "bf16", 16)


@pytest.fixture(scope="module")
def layers(folder: Path) -> TimeProfile:
    return load_time_profile(folder / "time.csv")


@pytest.fixture(scope="module")
def head(folder: Path) -> HeadProfile:
    return load_head_profile(folder / "head_time.csv")


def test_layers_are_estimated(work: Workload, layers: TimeProfile) -> None:
    assert layer_error(work, work.accelerator.efficiency, layers) < 0.08
    rows = layers.mbs * layers.seq_len == 8192
    columns = (layers.tp, layers.seq_len, layers.mbs, layers.time_ms)
    of_long = TimeProfile(*(column[rows] for column in columns))
    assert layer_error(work, work.accelerator.efficiency, of_long) < 0.02


def test_calibrating_finds_what_is_shipped(work: Workload, layers: TimeProfile) -> None:
    shipped = work.accelerator.efficiency
    found = calibrate(work, GENERAL, layers)
    assert found.starts_ahead
    for name in ("matmul", "attention", "start_ms"):
        assert getattr(found, name) == pytest.approx(getattr(shipped, name), rel=0.02)


@pytest.mark.parametrize("tokens", [512, 2048, 4096, 8192])
def test_embedding_and_head_are_estimated(work: Workload, head: HeadProfile, tokens: int) -> None:
    rows = head.rows.mbs * head.rows.seq_len == tokens
    b, s = head.rows.mbs[rows], head.rows.seq_len[rows]
    for estimated_ms, measured_ms in ((base_ms, head.base_ms), (head_ms, head.rows.time_ms)):
        assert measured_ms is not None
        found_ms = estimated_ms(work, work.accelerator.efficiency, 1, b, s)
        assert float(found_ms.mean()) == pytest.approx(measured_ms[rows].mean(), rel=0.25)


@pytest.mark.parametrize("start_ms", [1.0, 7.0, 40.0])
def test_rows_of_the_longer_of_start_and_work_give_back_what_made_them(start_ms: float) -> None:
    work = Workload(NAMED_SHAPES["7B"], TABLES.accelerator("A100-40GB"), "bf16", 16)
    truth = replace(GENERAL, matmul=0.5, attention=0.3, start_ms=start_ms, starts_ahead=True)
    s, b = (axis.reshape(-1) for axis in np.meshgrid([128, 512, 2048, 8192], [1, 2, 4, 8]))
    profile = TimeProfile(np.ones_like(b), s, b, layer_ms(work, truth, 1, b, s))
    found = calibrate(work, GENERAL, profile)
    assert found.starts_ahead
    for name in ("matmul", "attention", "start_ms"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-6)
