"""On LobRA's published 7B profile: what docs/results states."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from lobra.layout.layout import Layout
from lobra.layout.shapes import NAMED_SHAPES
from lobra.profiler.accelerators import load_tables
from lobra.profiler.calibration import calibrate
from lobra.profiler.cost_model import fit_cost_model, padded_work
from lobra.profiler.estimate_memory import Adapters, estimate_memory
from lobra.profiler.estimate_time import Workload, layer_ms
from lobra.profiler.lookup import published_memory_path, published_time_path
from lobra.profiler.profiles import TimeProfile, load_time_profile
from lobra.profiler.validation import (
    cross_validate,
    least_possible_error,
    refusals,
    suspicious_rows,
)
from lobra.tasks.target_modules import TARGET_MODULES
from tests.profiler.support import num_decreasing

# (layout, sequence length, micro-batches, seconds a step): LobRA's homogeneous throughput table.
PUBLISHED_STEPS = [
    ((1, 1), 2048, 4, 1.778),
    ((1, 2), 2048, 8, 1.978),
    ((2, 1), 4096, 8, 4.297),
    ((2, 2), 4096, 16, 4.612),
    ((4, 1), 8192, 16, 10.530),
    ((4, 2), 8192, 32, 11.143),
    ((8, 1), 16384, 32, 29.271),
    ((8, 2), 16384, 64, 30.468),
]


@pytest.fixture(scope="module")
def profile(project_root: Path) -> TimeProfile:
    return load_time_profile(project_root / published_time_path("7B"))


def test_held_out_rows_and_lengths(profile: TimeProfile) -> None:
    for ours, theirs in zip(
        cross_validate(profile, "fitted"), cross_validate(profile, "lobra6"), strict=True
    ):
        assert ours.median_error < 0.02
        assert ours.mean_error < 0.04
        assert ours.mean_error < theirs.mean_error
    for unseen in cross_validate(profile, "fitted", by_length=True):
        longest = profile.seq_len[unseen.rows] == profile.seq_len[unseen.rows].max()
        assert unseen.mean_error < 0.04
        assert np.abs(unseen.error[longest]).mean() < 0.04


def test_never_decreases(profile: TimeProfile) -> None:
    model = fit_cost_model(profile, 32)
    assert [num_decreasing(fit, 32768, 64) for fit in model.layers.values()] == [0, 0, 0, 0]


def test_the_rows_contradict_each_other(profile: TimeProfile) -> None:
    """No function of b and s that never decreases is within 6 % of all rows of tp 1 and 8."""
    assert least_possible_error(profile, 1) > 0.06
    assert least_possible_error(profile, 8) > 0.06
    validations = cross_validate(profile, "fitted")
    named = {(row.tp, row.b, row.s) for row in suspicious_rows(profile, validations)}
    assert {(8, 4, 256), (1, 1, 1024)} <= named
    assert len(named) < 0.06 * len(profile)
    assert refusals(profile, validations) == []


def test_published_steps_are_predicted(profile: TimeProfile) -> None:
    model = fit_cost_model(profile, 32)
    for (tp, pp), length, number, published_s in PUBLISHED_STEPS:
        time = model.micro_batch_time(Layout(tp, pp), *padded_work(1, length))
        step_s = (number + pp - 1) * float(time.total_ms) / 1000
        assert step_s == pytest.approx(published_s, rel=0.06)


def test_time_estimated_from_tp_1_alone(profile: TimeProfile) -> None:
    tables = load_tables()
    shape, accelerator = NAMED_SHAPES["7B"], tables.accelerator("A100-40GB")
    work = Workload(shape, accelerator, "bf16", 16, keeps_elementwise=True)
    efficiency = calibrate(work, work.accelerator.efficiency, profile)
    error = [
        abs(float(layer_ms(work, efficiency, int(tp), int(b), int(s))) / time_ms - 1.0)
        for tp, b, s, time_ms in zip(
            profile.tp, profile.mbs, profile.seq_len, profile.time_ms, strict=True
        )
        if tp > 1
    ]
    assert np.mean(error) < 0.15


def test_memory_estimated(project_root: Path) -> None:
    tables = load_tables()
    shape, runtime = NAMED_SHAPES["7B"], tables.runtime("hetu")
    adapters = Adapters(((16, TARGET_MODULES),) * 6)
    budget = 0.9 * tables.accelerator("A100-40GB").memory_bytes
    equal = 0
    with (project_root / published_memory_path("7B", 6)).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        tp, pp, published = int(row["tp"]), int(row["pp"]), int(row["max_tokens"])
        estimate = estimate_memory(shape, tp, pp, adapters, "bf16", runtime)
        steps = math.log2(estimate.max_tokens(budget, 256, 16384) / published)
        assert abs(math.floor(steps)) <= 1
        equal += math.floor(steps) == 0
    assert len(rows) == 14
    assert equal >= 10


def test_our_own_runtime_holds_lobras_longest_sequences_where_lobra_does() -> None:
    tables = load_tables()
    budget = 0.9 * tables.accelerator("A100-40GB").memory_bytes
    adapters = Adapters(((16, TARGET_MODULES),) * 6)
    estimate = estimate_memory(NAMED_SHAPES["7B"], 8, 1, adapters, "bf16", tables.runtime(None))
    assert estimate.max_tokens(budget, 256, 1 << 20) >= 16384
