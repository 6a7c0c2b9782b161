from __future__ import annotations

import numpy as np
import pytest

from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, make_plan
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.simulate import simulate, simulate_packed
from lobra.planner.step_time import sync_time_s
from lobra.planner.workload import Workload
from lobra.profiler.collectives import SYNC, Collectives, Link
from lobra.profiler.cost_model import TokenShares, fit_cost_model
from lobra.profiler.profiles import TimeProfile
from tests.planner.support import MIXED_PLAN, plain_cost_model, two_tasks


def test_a_simulation_is_the_dispatcher_step_by_step() -> None:
    cost_model = plain_cost_model()
    found = simulate(MIXED_PLAN, two_tasks(), cost_model, 4, first_step=3)
    expected = [
        dispatch(lengths, MIXED_PLAN, cost_model).step_time_s for lengths in two_tasks().steps(4, 3)
    ]
    assert found.step_time_s.tolist() == expected
    summary = found.summary()
    assert summary["mean_s"] == pytest.approx(np.mean(expected))
    assert 0 <= summary["idle"] < 1
    assert 0 <= summary["padding"] < 1
    assert summary["gpu_seconds"] == pytest.approx(4 * np.mean(expected))


def test_a_packed_simulation_is_the_packed_dispatcher_step_by_step() -> None:
    cost_model = plain_cost_model()
    found = simulate_packed(MIXED_PLAN, two_tasks(), cost_model, 4)
    costs = packed_costs(MIXED_PLAN, cost_model)
    expected = [dispatch_packed(step, MIXED_PLAN, costs) for step in two_tasks().steps(4)]
    assert found.step_time_s.tolist() == [each.step_time_s for each in expected]
    assert found.padded_tokens.tolist() == [each.padded_tokens for each in expected]


def test_synchronisation_is_added_where_it_was_profiled() -> None:
    """Once a step, for all ranks that hold a layer; the published cost model has no such term."""
    links = Collectives({(SYNC, 2): Link(5.0, 0.0), (SYNC, 4): Link(9.0, 1e-6)}, 1.0)
    rows = np.array([(tp, s, b) for tp in (1, 2) for s in (64, 128, 256) for b in (1, 2, 4)])
    profile = TimeProfile(*rows.T, 1.0 + 0.01 * rows[:, 1] * rows[:, 2] / rows[:, 0])
    plain = fit_cost_model(profile, 4)
    plan = make_plan([ReplicaGroup(Layout(1, 2), 2, 512), ReplicaGroup(Layout(2, 2), 1, 512)])
    assert sync_time_s(plan, plain.for_training(TokenShares(), 1e6)) == 0
    model = fit_cost_model(profile, 4, collectives=links).for_training(TokenShares(), 1e6)
    half = 1e6 * 4 / 2  # bytes of two of the four layers
    assert sync_time_s(plan, model) == pytest.approx((9.0 + 1e-6 * half) / 1000)
    work = Workload({"t": np.full(8, 100)}, {"t": 4}, {})
    run = simulate(plan, work, model, 2)
    assert run.step_time_s == pytest.approx(run.busy_s.max(axis=1) + sync_time_s(plan, model))
