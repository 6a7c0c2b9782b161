"""Cross-validation: exact on data of the model's own form, folds fair, mistakes named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.layout.shapes import NAMED_SHAPES
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_time import Workload, layer_ms
from lobra.profiler.grid import time_grid
from lobra.profiler.profiles import TimeProfile
from lobra.profiler.validation import cross_validate, fold_of_row, suspicious_rows, worst_rows
from tests.tiers import examples


def profile(noise: float = 0.0, repeats: int = 1) -> TimeProfile:
    tp, s, b = (
        axis.reshape(-1).repeat(repeats)
        for axis in np.meshgrid([1, 2], [128, 256, 512, 1024], [1, 2, 4, 8], indexing="ij")
    )
    time_ms = (0.5 + 1e-3 * b * s + 1e-6 * b * s * s) / tp
    time_ms = time_ms * (1 + noise * np.random.default_rng(0).standard_normal(len(tp)))
    return TimeProfile(tp, s, b, time_ms)


@pytest.mark.parametrize("kind", ["fitted", "lobra6"])
def test_a_time_of_the_models_own_form_is_predicted(kind) -> None:
    for validation in cross_validate(profile(), kind):
        assert validation.max_error < 1e-3


def test_the_error_is_that_of_rows_not_seen() -> None:
    spoiled = profile()
    spoiled.time_ms[5] *= 3
    results = cross_validate(spoiled, "fitted")
    row = worst_rows(spoiled, results, 1)[0]
    assert row[:3] == (spoiled.tp[5], spoiled.mbs[5], spoiled.seq_len[5])
    assert row[4] == pytest.approx(-2 / 3, abs=0.05), "the fit did not bend towards the row"


def test_folds_are_even_and_repeats_stay_together() -> None:
    table = profile(repeats=3)
    folds = fold_of_row(table, 5)
    for tp in table.tps:
        counts = np.bincount(folds[table.tp == tp], minlength=5) // 3
        assert counts.max() - counts.min() <= 1
    for row in range(0, len(table), 3):
        assert len(set(folds[row : row + 3])) == 1


def test_too_few_rows_or_folds() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        cross_validate(profile(), "fitted", 1)
    with pytest.raises(ConfigError) as error:
        cross_validate(profile(), "fitted", 17)
    assert len(error.value.problems) == 2, "both tp are named"


def estimated() -> TimeProfile:
    """Rows without noise, flat below 256 tokens, where only the smallest ones can tell so."""
    tables = load_tables()
    work = Workload(NAMED_SHAPES["7B"], tables.accelerator("A100-40GB"), "bf16", 16)
    b, s = np.array(time_grid(16384)).T
    times = layer_ms(work, work.accelerator.efficiency, 1, b, s)
    return TimeProfile(np.ones_like(b), s, b, times, meta={"settings": {}})


@given(seed=st.integers(0, 2**32 - 1), percent=st.integers(50, 80))
@examples(3, 20)
def test_rows_without_noise_are_not_suspicious_but_a_spoiled_one_is(
    seed: int, percent: int
) -> None:
    profile = estimated()
    held_out = cross_validate(profile, "fitted", seed=seed)
    assert held_out[0].max_error > 0.05, "the smallest are extrapolated"
    assert suspicious_rows(profile, held_out) == ()
    row = int(np.flatnonzero((profile.seq_len == 1024) & (profile.mbs == 4))[0])
    profile.time_ms[row] *= percent / 100
    named = suspicious_rows(profile, cross_validate(profile, "fitted", seed=seed))
    assert (1, 4, 1024) in {(found.tp, found.b, found.s) for found in named}
