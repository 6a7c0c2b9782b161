"""The planner of packed steps on the instances of `benchmarks.planning`, and on hard ones."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lobra.layout.plan import make_plan
from lobra.planner.bucketed import exact as bucketed
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidate, all_candidates
from lobra.planner.fleet import Fleet
from lobra.planner.packed import exact
from lobra.planner.packed.deploy import sampled_steps
from lobra.planner.packed.problem import PackedProblem
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

Row = dict[str, Any]
SEQUENCES = 832  # of a step on up to 64 GPUs, as those of the six tasks
DRAWN = 20_000  # lengths of a made-up data set
INSTANCES = 12  # random ones
LONGEST = 16384
BAR = 2.0  # %: the gap up to 64 GPUs


def hard_workloads() -> Mapping[str, Workload]:
    """Return made-up workloads, by what is hard about them."""
    rng = np.random.default_rng(0)
    tail = np.minimum(rng.lognormal(5.5, 1.4, DRAWN).astype(np.int64) + 1, 16384)
    short = rng.integers(50, 1000, DRAWN)
    rare = np.where(rng.random(DRAWN) < 1 / SEQUENCES, 16384, short)
    lengths = {
        "heavy tail": tail,
        "rarely 16k": rare,
        "all equal": np.full(DRAWN, 1000),
        "two just over a capacity": rng.choice([2100, 4200], DRAWN),
    }
    return {
        name: Workload({"one": values}, {"one": SEQUENCES}, {"one": 0})
        for name, values in lengths.items()
    }


def random_instances() -> Iterator[tuple[str, int, Workload]]:
    """Yield what is hard about an instance, its GPUs, and a workload of 16 to 64 sequences each."""
    rng = np.random.default_rng(1)
    for place in range(INSTANCES):
        num_gpus = int(rng.choice([16, 32, 64]))
        sequences = num_gpus * int(rng.integers(16, 65))
        short = rng.integers(50, rng.integers(300, 2000), DRAWN)
        tail = rng.lognormal(rng.uniform(5.0, 6.5), rng.uniform(0.8, 1.5), DRAWN).astype(np.int64)
        over = int(rng.choice([1024, 2048, 4096]) * rng.uniform(1.01, 1.1))
        name, lengths = (
            ("heavy tail", np.minimum(tail + 1, LONGEST)),
            ("rarely 16k", np.where(rng.random(DRAWN) < 1 / sequences, LONGEST, short)),
            ("all equal", np.full(DRAWN, short[0])),
            ("two just over a capacity", rng.choice([over, 2 * over], DRAWN)),
        )[place % 4]
        yield name, num_gpus, Workload({"one": lengths}, {"one": sequences}, {"one": 0})


def bench_random(memory: MemoryProfile, cost_model: CostModel) -> Iterator[Row]:
    """Gaps of random instances, and of how many they are within the bar."""
    within = 0
    for name, num_gpus, workload in random_instances():
        candidates = all_candidates(memory, cost_model, num_gpus, workload.longest, 8).chosen
        row = _measured(workload, candidates, num_gpus, cost_model)
        within += row["gap %"] <= BAR
        yield {"instance": name, "GPUs": num_gpus, "sequences": workload.batch_sizes["one"]} | row
    yield {"within the bar": within, "of": INSTANCES}


def bench_packed(
    memory: MemoryProfile,
    cost_model: CostModel,
    workloads: Mapping[str, Workload],
    gpus: Sequence[int],
    capacities: Sequence[int] = (1,),
) -> Iterator[Row]:
    """Gap and seconds of packed planning, against homogeneous and bucketed plans run packed.

    ``capacities`` are factors of the profile's tokens: what less memory per token would allow.
    """
    for name, workload in workloads.items():
        for factor in capacities:
            for num_gpus in gpus:
                own = workload if num_gpus <= 64 else _larger(workload, num_gpus // 16)
                found = all_candidates(memory, cost_model, num_gpus, own.longest, 8).chosen
                candidates = tuple(replace(c, max_tokens=c.max_tokens * factor) for c in found)
                yield {"instance": name, "capacity": factor, "GPUs": num_gpus} | _measured(
                    own, candidates, num_gpus, cost_model
                )


def _measured(
    workload: Workload, candidates: tuple[Candidate, ...], num_gpus: int, cost_model: CostModel
) -> Row:
    steps = sampled_steps(workload)
    cost_model = replace(cost_model)  # of another, nothing is known from the instance before
    problem = PackedProblem(steps, workload.longest, Fleet(candidates, num_gpus), cost_model)
    start, processor = time.perf_counter(), time.process_time()
    found = exact.solve(problem)
    seconds, processor_s = time.perf_counter() - start, time.process_time() - processor
    plan, step_s = next(iter(found.step_s.items()))
    mean_s = float(step_s.mean())
    batch = expect(workload, 16)
    padded = bucketed.solve(
        Problem(batch.counts, batch.buckets, candidates, num_gpus, cost_model)
    ).plan
    other_s = problem.step_s(make_plan(padded.groups), range(len(steps)))
    return {
        "plan": str(plan),
        "replicas": len(plan.replicas),
        "steps": len(steps),
        "mean s": mean_s,
        "GPU-seconds": mean_s * plan.num_gpus,
        "bound, GPU-seconds": found.lower_bound_s * num_gpus,
        "gap %": 100 * (1 - found.lower_bound_s / mean_s),
        "seconds": seconds,
        "processor s": processor_s,
        "homogeneous": found.homogeneous_s / mean_s,
        "bucketed, packed": float(other_s.mean()) / mean_s,
    }


def _larger(workload: Workload, factor: int) -> Workload:
    sizes = {task: size * factor for task, size in workload.batch_sizes.items()}
    return replace(workload, batch_sizes=sizes)
