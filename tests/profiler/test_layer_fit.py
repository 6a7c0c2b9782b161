"""The fit: never decreasing, close to what made the rows, honest about what it does not know."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.profiler.layer_fit import fit_layer
from tests.profiler.support import num_decreasing
from tests.tiers import examples

SHAPES = [(b, s) for s in (64, 128, 256, 512, 1024, 2048) for b in (1, 2, 4, 8) if b * s <= 4096]


def every_shape() -> tuple[np.ndarray, np.ndarray]:
    b, s = np.array(SHAPES, dtype=np.float64).T
    return b, s


def layer_ms(b, s) -> np.ndarray:
    """A device that is idle below 300 tokens and pays for attention."""
    return 2.0 + 0.004 * np.maximum(b * s, 300.0) + 4e-7 * b * s * s


@st.composite
def measured_rows(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """Some of the shapes (b, s), in any order, each with its time in % of what it truly takes."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, unique=True))
    percent = st.just(100) | st.integers(95, 105) | st.integers(25, 400)
    return [(b, s, draw(percent)) for b, s in shapes]


@given(measured_rows())
@examples(40, 400)
def test_never_decreases_whatever_the_rows(rows: list[tuple[int, int, int]]) -> None:
    b, s, percent = np.array(rows, dtype=np.float64).T
    time_ms = layer_ms(b, s) * percent / 100
    fit = fit_layer(b, s, time_ms, "fitted")
    assert num_decreasing(fit, longest=16384, largest=32) == 0
    far = fit.time_ms(np.array([1.0, 64.0]), np.array([1.0, 65536.0]))
    assert (far > 0).all()
    assert np.isfinite(far).all()


def test_of_exact_rows_held_out_shapes_are_close() -> None:
    b, s = every_shape()
    for out in range(len(b)):
        rest = np.arange(len(b)) != out
        fit = fit_layer(b[rest], s[rest], layer_ms(b, s)[rest], "fitted")
        assert float(fit.time_ms(b[out], s[out])) == pytest.approx(layer_ms(b, s)[out], rel=0.06)


def test_extrapolation_four_times_beyond_the_longest() -> None:
    b, s = every_shape()
    fit = fit_layer(b, s, layer_ms(b, s), "fitted")
    assert float(fit.time_ms(1.0, 8192.0)) == pytest.approx(float(layer_ms(1, 8192)), rel=0.1)


def test_one_bad_row_does_not_bend_the_fit() -> None:
    b, s = every_shape()
    time_ms = layer_ms(b, s)
    row = int(np.flatnonzero((b == 2) & (s == 512))[0])
    time_ms[row] *= 2
    fit = fit_layer(b, s, time_ms, "fitted")
    rest = np.arange(len(b)) != row
    error = fit.time_ms(b[rest], s[rest]) / time_ms[rest] - 1.0
    assert np.abs(error).mean() < 0.02


def test_broadcasting_agrees_with_one_by_one() -> None:
    b, s = every_shape()
    fit = fit_layer(b, s, layer_ms(b, s), "fitted")
    sizes, lengths = np.arange(1, 5), np.array([16, 700, 5000])
    table = fit.time_ms(sizes[:, None], lengths[None, :])
    assert table.shape == (4, 3)
    for row, size in enumerate(sizes):
        for column, length in enumerate(lengths):
            assert table[row, column] == float(fit.time_ms(size, length))
