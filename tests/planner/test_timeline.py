from __future__ import annotations

import numpy as np
import pytest

from lobra.planner.dispatch import dispatch
from lobra.planner.timeline import timeline
from tests.planner.support import MIXED_PLAN, plain_cost_model, two_tasks


def test_every_stage_is_filled_for_its_replicas_time() -> None:
    cost_model = plain_cost_model()
    found = dispatch(next(two_tasks().steps(1)), MIXED_PLAN, cost_model)
    for trace, time_s in zip(
        timeline(found, MIXED_PLAN, cost_model), found.replica_time_s, strict=True
    ):
        for stage in trace.stages:
            assert [one.start_s for one in stage] == pytest.approx(
                np.cumsum([0.0, *(one.length_s for one in stage)])[:-1]
            )
            assert sum(one.length_s for one in stage) == pytest.approx(time_s)
