"""Deployments of packed steps: policies are mixed, one layout is taken where that is as good."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.planner.deploy import deploy
from lobra.planner.deployment import Options, as_json, plan_with_meta
from lobra.planner.workload import Workload
from lobra.profiler.profiles import MemoryProfile, MemoryRow
from tests.planner.support import LawCostModel, plain_cost_model, two_tasks

PACKED = Options(batching="packed", gpus_per_node=4)


def memory_of(*rows: tuple[int, int, int, int, str]) -> MemoryProfile:
    return MemoryProfile(tuple(MemoryRow(*row) for row in rows))


def test_a_plan_mixes_memory_policies_where_long_sequences_are_rare() -> None:
    """Recomputing takes 1.4 times as long: only the replica that needs the room does it."""
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(4000) < 0.02, 1900, rng.integers(50, 400, 4000))
    workload = Workload({"one": lengths}, {"one": 120}, {"one": 0})
    memory = memory_of((1, 1, 1, 1000, "keep"), (1, 1, 1, 2000, "full"))
    found = deploy(workload, memory, plain_cost_model(), 4, PACKED)
    assert {group.layout.memory for group in found.plan.groups} == {"keep", "full"}
    assert found.homogeneous is not None
    assert found.outcome.step_time_s < 0.99 * found.homogeneous.step_time_s
    assert found.outcome.lower_bound_s <= found.outcome.step_time_s
    result = as_json(found)
    assert result["sampled"]["mean_step_time_s"] == pytest.approx(found.outcome.step_time_s)
    assert result["sampled"]["gap"] == pytest.approx(found.outcome.gap)
    meta = plan_with_meta(found, "tiny", memory, 4).meta
    assert meta["batching"] == "packed" and meta["buckets"] == []


def test_one_layout_is_taken_where_no_mixture_is_one_per_cent_faster() -> None:
    lengths = {"one": np.full(500, 100)}
    workload = Workload(lengths, {"one": 64}, {"one": 0})
    costs = LawCostModel(8, {1: (0.0, 0.0, 0.01, 0.0, 0.0), 2: (0.0, 0.0, 0.00501, 0.0, 0.0)})
    memory = memory_of((1, 1, 1, 800, "keep"), (2, 1, 1, 1600, "keep"))
    found = deploy(workload, memory, costs, 4, PACKED)
    assert len(found.plan.groups) == 1
    assert found.plan == found.homogeneous.plan  # type: ignore[union-attr]
    assert found.sampled.gap <= 0.01


class SlowExchange(LawCostModel):
    """A cost model under which adapters take 7 ms to synchronise."""

    def sync_time_ms(self, num_ranks: int, layers_share: float = 1.0) -> float:
        return 7.0


def test_plans_are_compared_with_the_synchronisation_in_their_times() -> None:
    workload = Workload({"one": np.full(500, 100)}, {"one": 64}, {"one": 0})
    costs = SlowExchange(8, {1: (0.0, 0.0, 0.01, 0.0, 0.0)})
    found = deploy(workload, memory_of((1, 1, 1, 800, "keep")), costs, 4, PACKED)
    assert found.homogeneous is not None and found.homogeneous.plan == found.plan
    same = found.with_sync(found.homogeneous)
    assert same.step_time_s == pytest.approx(found.sampled.mean_step_time_s)
    assert same.step_time_s == pytest.approx(found.homogeneous.step_time_s + 0.007)


def test_lobras_patterns_plan_no_packed_steps() -> None:
    memory = memory_of((1, 1, 1, 4096, "keep"))
    with pytest.raises(ConfigError, match="'PRUNE' plans padded buckets only"):
        deploy(two_tasks(), memory, plain_cost_model(), 2, replace(PACKED, pattern="PRUNE"))


def test_a_run_that_ends_early_is_planned_for_the_steps_it_has() -> None:
    workload = replace(two_tasks(), num_steps={"short": 3, "long": 2})
    memory = memory_of((1, 1, 1, 4096, "keep"), (2, 1, 1, 8192, "keep"))
    found = deploy(workload, memory, plain_cost_model(), 2, PACKED)
    assert found.sampled.steps == 3


@pytest.mark.parametrize(("share", "said"), [(0.5, True), (0.02, False)])
def test_steps_that_wait_for_one_sequence_are_counted(share: float, said: bool) -> None:
    rng = np.random.default_rng(0)
    long = rng.random(4000) < share / 6
    lengths = np.where(long, 2000, rng.integers(50, 100, 4000))
    workload = Workload({"one": lengths}, {"one": 6}, {"one": 0})
    found = deploy(workload, memory_of((1, 1, 1, 2000, "keep")), plain_cost_model(), 4, PACKED)
    notes = [note for note in found.outcome.notes if "take as long as one of their" in note]
    assert bool(notes) == said
    if said:
        steps = [max(step) for step in workload.steps(100)]
        waiting = np.mean(np.array(steps) == 2000)
        assert float(notes[0].partition("%")[0]) / 100 == pytest.approx(waiting, abs=0.05)
