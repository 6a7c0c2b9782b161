"""What plans are made of: divided replicas become whole ones."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.planner.candidates import Candidate
from lobra.planner.fleet import Fleet
from tests.planner.strategies import LAYOUTS


@given(st.data(), st.integers(1, 20))
def test_whole_replicas_fit_and_hold_the_longest(data: st.DataObject, num_gpus: int) -> None:
    usable = [layout for layout in LAYOUTS if layout.num_gpus <= num_gpus]
    layouts = data.draw(st.lists(st.sampled_from(usable), min_size=1, unique=True))
    candidates = tuple(Candidate(each, data.draw(st.integers(10, 90))) for each in sorted(layouts))
    fleet = Fleet(candidates, num_gpus, num_gpus)
    longest = data.draw(st.sampled_from(fleet.max_tokens.tolist()))
    parts = np.array([data.draw(st.floats(0.0, 1.0)) for _ in candidates])
    divided = parts / max(parts.sum(), 1e-9) * num_gpus / fleet.sizes
    whole = fleet.rounded(divided - 1e-18, longest)  # as solvers say nothing
    assert (whole >= 0).all() and whole @ fleet.sizes <= num_gpus
    assert (fleet.max_tokens[whole > 0] >= longest).any()
    assert num_gpus - whole @ fleet.sizes < fleet.sizes.min()
    if (divided == np.rint(divided)).all() and (fleet.max_tokens[divided > 0] >= longest).any():
        assert (whole >= divided).all()
