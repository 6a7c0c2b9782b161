from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.chunks import chunk_table
from planner.dispatch import dispatch
from planner.evaluate import step_time_s
from planner.layout import Layout
from planner.plan import Plan, ReplicaGroup, make_plan
from planner.simulate import lpt_times_s
from tasks.errors import ConfigError
from tests.planner.support import best_dispatch_s, random_cost_model, random_problem


def random_plan(rng: np.random.Generator) -> Plan:
    layouts = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]
    chosen = rng.choice(len(layouts), size=int(rng.integers(1, 4)), replace=False)
    return make_plan(
        [
            ReplicaGroup(Layout(*layouts[i]), int(rng.integers(1, 5)), 1024 * layouts[i][0])
            for i in chosen
        ]
    )


@given(st.integers(0, 10**6))
@settings(max_examples=150, deadline=None)
def test_every_sequence_once_no_chunk_too_large_longest_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan, cost_model = random_plan(rng), random_cost_model(rng)
    lengths = rng.integers(1, plan.max_tokens - 15, size=int(rng.integers(1, 120)))
    lengths = np.minimum(lengths, plan.max_tokens // 16 * 16)
    mode = "group" if seed % 3 == 0 else "balance"
    result = dispatch(lengths, plan, cost_model, num_buckets=6, mode=mode)
    placed = [chunk.indices for chunks in result.micro_batches for chunk in chunks]
    assert sorted(np.concatenate(placed).tolist()) == list(range(len(lengths)))
    for replica, chunks in zip(plan.replicas, result.micro_batches, strict=True):
        for chunk in chunks:
            assert chunk.padded_tokens <= replica.max_tokens
            assert lengths[chunk.indices].max() <= chunk.padded_length
            assert chunk.padded_length in result.buckets
        costs = [
            float(cost_model.chunk_time_ms(replica.layout.tp, 1, c.num_sequences, c.padded_length))
            for c in chunks
        ]
        assert costs == sorted(costs, reverse=True)
    pairs = [
        [(c.num_sequences, c.padded_length) for c in chunks] for chunks in result.micro_batches
    ]
    assert result.step_time_s == pytest.approx(step_time_s(plan, pairs, cost_model), rel=1e-12)
    assert result.step_time_s == max(result.replica_time_s)
    assert result.lower_bound_s <= result.step_time_s


@given(st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_the_bound_is_never_above_the_optimum_nor_the_result_below(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, "lobra6" if seed % 2 else "fitted")
    replicas = np.zeros(len(problem.candidates), dtype=int)
    order = rng.permutation(len(replicas))
    left = problem.num_gpus
    for index in order:
        replicas[index] = rng.integers(0, left // problem.sizes[index] + 1)
        left -= replicas[index] * problem.sizes[index]
    longest = int(problem.buckets[-1])
    holds = np.array([candidate.max_tokens >= longest for candidate in problem.candidates])
    if not replicas[holds].any():
        return
    plan = problem.plan(replicas)
    tables = [
        chunk_table(r.layout, r.max_tokens, problem.buckets, problem.cost_model, problem.counts)
        for r in plan.replicas
    ]
    optimum = best_dispatch_s(tables, problem.counts)
    found = problem.evaluate(plan)
    assert found.lower_bound_s <= optimum * (1 + 1e-9)
    assert optimum <= found.step_time_s * (1 + 1e-9)


def test_the_same_step_is_dispatched_the_same_way() -> None:
    rng = np.random.default_rng(3)
    plan, cost_model = random_plan(rng), random_cost_model(rng)
    lengths = rng.integers(1, 900, size=200)
    first, second = (dispatch(lengths, plan, cost_model) for _ in range(2))
    for left, right in zip(first.micro_batches, second.micro_batches, strict=True):
        assert [c.indices.tolist() for c in left] == [c.indices.tolist() for c in right]


@pytest.mark.parametrize("seed", range(40))
def test_never_slower_than_greedy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost_model = random_cost_model(rng)
    groups = [
        ReplicaGroup(Layout(1, 1), int(rng.integers(1, 9)), 1024),
        ReplicaGroup(Layout(1, 4), int(rng.integers(1, 4)), 1024),
        ReplicaGroup(Layout(4, 1), int(rng.integers(1, 3)), 4096),
    ]
    plan = make_plan(groups)
    lengths = np.minimum(4096, rng.lognormal(5.5, 1.2, size=int(rng.integers(1, 60))) + 1)
    found = dispatch(lengths.astype(int), plan, cost_model, num_buckets=8)
    greedy = lpt_times_s(lengths.astype(int), found.buckets, plan, cost_model)
    assert found.step_time_s <= greedy.max() * (1 + 1e-9)


def test_an_idle_pipeline_does_not_end_the_search() -> None:
    cost_model = random_cost_model(np.random.default_rng(0))
    plan = make_plan([ReplicaGroup(Layout(1, 1), 6, 1024), ReplicaGroup(Layout(1, 4), 1, 1024)])
    found = dispatch([777] * 3, plan, cost_model)
    assert max(len(chunks) for chunks in found.micro_batches) == 1


@pytest.mark.parametrize("seed", range(10))
def test_slower_replicas_get_less_and_the_bound_holds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost_model = random_cost_model(rng)
    plan = make_plan([ReplicaGroup(Layout(1, 1), 3, 1024), ReplicaGroup(Layout(2, 1), 1, 2048)])
    lengths = rng.integers(20, 900, size=150)
    factors = np.array([1.0, 2.0, 1.002, 0.97])
    found = dispatch(lengths, plan, cost_model, slowdown=factors)
    tokens = [sum(c.padded_tokens for c in chunks) for chunks in found.micro_batches]
    assert tokens[1] < 0.75 * tokens[0]
    assert found.lower_bound_s <= found.step_time_s <= 1.05 * found.lower_bound_s
    assert found.step_time_s == max(found.replica_time_s)
    assert sorted(
        int(i) for chunks in found.micro_batches for c in chunks for i in c.indices
    ) == list(range(150))


@pytest.mark.parametrize(
    ("lengths", "buckets", "message"),
    [
        ([], None, "no sequence"),
        ([5.5], None, "whole numbers"),
        ([0, 3], [16], "at least 1"),
        ([5], [512, 256], "not positive and ascending"),
        ([5], [], "not positive and ascending"),
    ],
)
def test_lengths_and_buckets_are_checked(
    lengths: list[float], buckets: list[int] | None, message: str
) -> None:
    cost_model = random_cost_model(np.random.default_rng(0))
    plan = make_plan([ReplicaGroup(Layout(1, 1), 1, 1024)])
    given = None if buckets is None else np.array(buckets, dtype=int)
    with pytest.raises(ConfigError, match=message):
        dispatch(lengths, plan, cost_model, buckets=given)
    with pytest.raises(ValueError, match="positive factor"):
        dispatch([5], plan, cost_model, slowdown=[np.inf])


def test_group_mode_uses_only_the_least_sufficient_capacity() -> None:
    cost_model = random_cost_model(np.random.default_rng(0))
    groups = [ReplicaGroup(Layout(1, 1), 2, 512), ReplicaGroup(Layout(2, 1), 1, 1024)]
    plan = make_plan(groups)
    lengths = np.array([100] * 30 + [900] * 2)
    result = dispatch(lengths, plan, cost_model, mode="group")
    assert {c.padded_length for c in result.micro_batches[2]} == {912}
    assert all(c.padded_length == 112 for chunks in result.micro_batches[:2] for c in chunks)


def test_given_buckets_are_kept() -> None:
    cost_model = random_cost_model(np.random.default_rng(0))
    plan = make_plan([ReplicaGroup(Layout(1, 1), 2, 2048)])
    result = dispatch([5, 300, 700], plan, cost_model, buckets=np.array([512, 1024, 4096]))
    used = {c.padded_length for chunks in result.micro_batches for c in chunks}
    assert used == {512, 1024}


@pytest.mark.parametrize(
    ("lengths", "words"), [([5000], "fits no replica"), ([], "no sequence"), ([0], "at least 1")]
)
def test_impossible_steps_are_refused(lengths: list[int], words: str) -> None:
    plan = make_plan([ReplicaGroup(Layout(1, 1), 2, 2048)])
    with pytest.raises(ConfigError, match=words):
        dispatch(lengths, plan, random_cost_model(np.random.default_rng(0)))
