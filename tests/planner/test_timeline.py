from __future__ import annotations

import numpy as np
import pytest

from lobra.layout.sequences import BATCHINGS, Batching
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.timeline import timeline
from tests.planner.support import MIXED_PLAN, plain_cost_model, two_tasks


@pytest.mark.parametrize("batching", BATCHINGS)
def test_every_stage_is_filled_for_its_replicas_time(batching: Batching) -> None:
    cost_model = plain_cost_model()
    lengths = next(two_tasks().steps(1))
    if batching == "packed":
        costs = packed_costs(MIXED_PLAN, cost_model)
        found = dispatch_packed(lengths, MIXED_PLAN, costs)
    else:
        found = dispatch(lengths, MIXED_PLAN, cost_model)
    traces = timeline(found, lengths, MIXED_PLAN, cost_model)
    for trace, time_s in zip(traces, found.replica_time_s, strict=True):
        for stage in trace.stages:
            assert [one.start_s for one in stage] == pytest.approx(
                np.cumsum([0.0, *(one.length_s for one in stage)])[:-1]
            )
            assert sum(one.length_s for one in stage) == pytest.approx(time_s)
