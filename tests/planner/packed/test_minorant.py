"""A minorant is below its cost for any sequences, and near it where it is asked to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.sequences import packed_tokens
from lobra.planner.packed.minorant import minorant_of
from tests.planner.strategies import cost_models
from tests.planner.support import LawCostModel


@given(st.data(), cost_models(), st.integers(16, 4096), st.sampled_from([0.2, 1.0]))
def test_below_the_cost_of_any_micro_batch(
    data: st.DataObject, cost_model: LawCostModel, max_tokens: int, full: float
) -> None:
    def cost(tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
        return cost_model.micro_batch_time(Layout(1, 1), tokens, squares).total_ms

    minorant = minorant_of(cost, max_tokens, int(full * max_tokens) + 1, 200)
    assert min(minorant.start_ms, minorant.token_ms, minorant.square_ms) >= 0.0
    several = st.lists(st.integers(1, max_tokens), min_size=1, max_size=12)
    lengths = np.array(data.draw(several))
    lengths = lengths[packed_tokens(np.cumsum(lengths)) <= max_tokens]
    if not len(lengths):
        lengths = np.array([max_tokens])
    tokens = lengths.sum() if len(lengths) == 1 else packed_tokens(lengths.sum())
    time_ms = float(cost(np.array([tokens]), np.array([(lengths**2).sum()]))[0])
    least_ms = minorant.start_ms + minorant.marginal_ms(lengths).sum()
    assert least_ms <= time_ms * (1 + 1e-9)
    assert minorant.part_ms(lengths).sum() <= least_ms * (1 + 1e-9)
    assert minorant.marginal_share * minorant.part_ms(lengths).sum() <= (
        minorant.marginal_ms(lengths).sum() * (1 + 1e-9) + 1e-12
    )


@pytest.mark.parametrize("tokens", [1024, 4096])
def test_the_cost_itself_where_that_is_linear(tokens: int) -> None:
    def cost(tokens: np.ndarray, squares: np.ndarray) -> np.ndarray:
        return 20.0 + 0.1 * tokens + 2e-6 * squares

    found = minorant_of(cost, 4096, tokens, 600)
    value_ms = found.start_ms + found.token_ms * tokens + found.square_ms * tokens * 600
    assert value_ms == pytest.approx(20.0 + 0.1 * tokens + 2e-6 * tokens * 600, rel=2e-3)
