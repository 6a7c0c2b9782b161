from __future__ import annotations

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.greedy import lpt_times_s
from tests.planner.support import MIXED_PLAN, plain_cost_model


def test_greedy_dispatch_keeps_sequences_off_replicas_that_cannot_hold_them() -> None:
    cost_model = plain_cost_model()
    times = lpt_times_s(np.array([3000, 3000]), np.array([3008]), MIXED_PLAN, cost_model)
    assert (times[:2] == 0).all() and times[2] > 0
    with pytest.raises(ConfigError, match="fits no replica"):
        lpt_times_s(np.array([5000]), np.array([5008]), MIXED_PLAN, cost_model)
