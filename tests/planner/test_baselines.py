from __future__ import annotations

import numpy as np

from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, make_plan
from lobra.planner.baselines import baselines, ladder
from lobra.planner.candidates import Candidate
from lobra.planner.workload import Workload
from tests.planner.support import MIXED_PLAN, plain_cost_model, two_tasks


def test_baselines_and_ladder_run_on_the_same_steps() -> None:
    cost_model = plain_cost_model()
    candidates = (Candidate(Layout(1, 1), 1024), Candidate(Layout(1, 2), 4096))
    same, left_out = baselines(two_tasks(), candidates, cost_model, 4, 3)
    assert [run.name for run in same] == [
        "Task-Sequential, 7 fixed buckets",
        "Task-Fused, 7 fixed buckets",
    ]
    rungs, others = ladder(MIXED_PLAN, two_tasks(), cost_model, 3, batching="packed")
    assert left_out == others == []
    assert rungs[-1].name == "packed"
    tokens = {tuple(run.tokens.tolist()) for run in [*same, *rungs]}
    assert len(tokens) == 1
    for found in [*same, *rungs]:
        assert (found.padded_tokens >= found.tokens).all()


def test_what_is_left_out_says_why() -> None:
    cost_model = plain_cost_model()
    short = make_plan([ReplicaGroup(Layout(1, 1), 2, 3000)])
    work = Workload({"t": np.full(8, 2900)}, {"t": 4}, {})
    rungs, left_out = ladder(short, work, cost_model, 2)
    assert [run.name for run in rungs] == [
        "greedy LPT, dynamic buckets",
        "balanced, dynamic buckets",
    ]
    assert len(left_out) == 2
    assert all("fixed buckets: " in reason and "3072" in reason for reason in left_out)
    runs, (reason,) = baselines(work, (Candidate(Layout(1, 1), 3000),), cost_model, 2, 2)
    assert not runs and "no homogeneous plan of 2 GPUs holds all tasks" in reason
    long = Workload({"t": np.full(8, 20000)}, {"t": 4}, {})
    runs, (reason,) = baselines(long, (Candidate(Layout(1, 1), 32000),), cost_model, 2, 2)
    assert not runs and "20000 tokens is longer than the last bucket" in reason


def test_baselines_of_tasks_that_end_at_different_steps() -> None:
    work = Workload(
        {"a": np.full(8, 100), "b": np.full(8, 200)}, {"a": 4, "b": 4}, {},
        num_steps={"a": 1, "b": 3},
    )  # fmt: skip
    candidates = (Candidate(Layout(1, 1), 1024), Candidate(Layout(1, 2), 4096))
    (sequential, fused), _ = baselines(work, candidates, plain_cost_model(), 4, 10)
    assert sequential.tokens.tolist() == fused.tokens.tolist() == [1200, 800, 800]
    assert sequential.summary()["steps"] == 3
