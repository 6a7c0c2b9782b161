"""Benchmarks of the planner by subject, instance and size, on LobRA's published measurements."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.packed_planning import bench_packed, bench_random, hard_workloads
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.bucketed import exact, homogeneous, lobra
from lobra.planner.bucketed.buckets import bucket_index, make_buckets, plan_buckets
from lobra.planner.bucketed.columns import Budget, Pool, generate
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.bucketed.fluid_planner import FluidPlanner
from lobra.planner.bucketed.greedy import lpt_times_s
from lobra.planner.bucketed.identical import IdenticalModel
from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.time_table import plan_tables, time_table
from lobra.planner.candidates import all_candidates, propose
from lobra.planner.clock import Clock
from lobra.planner.dispatch import dispatch
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.planner.workload import Workload, make_workload
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.layer_fit import Kind
from lobra.profiler.profiles import MemoryProfile, load_memory_profile, load_time_profile
from lobra.tasks.lengths import load_lengths
from lobra.tasks.task_file import load_trainer_config

Row = dict[str, Any]
INSTANCES = {
    "6tasks": ("exp_task6", "lobra_like_6tasks.json"),
    "12tasks": ("exp_task12", "lobra_like_12tasks.json"),
    "real12": ("real12", "real_12tasks.json"),
}
NUM_LAYERS_7B = 32
LONGEST = 16384
# Of packed steps: times the published capacities (x2: activations take half the memory), the
# replicas (tp, pp, number), times the global batches.
PACKED_PLANS = (
    (1, ((1, 1, 6), (2, 1, 1), (8, 1, 1)), 1),
    (1, ((8, 1, 1), (1, 8, 1)), 1),
    (2, ((1, 1, 10), (2, 1, 1), (4, 1, 1)), 1),
    (4, ((1, 1, 12), (2, 1, 2)), 1),
    (4, ((1, 1, 8), (1, 8, 1)), 1),
    (4, ((1, 1, 14), (2, 1, 2)), 1),
    (4, ((1, 1, 57), (2, 1, 8)), 5),
)
MOST_PACKED = 4000  # sequences of a packed step
SIZES = (16, 24, 32, 48, 64, 256, 1024)


@dataclass(frozen=True, eq=False)
class Setting:
    """What every subject is given."""

    memory: MemoryProfile
    cost_model: CostModel
    workload: Workload
    gpus: tuple[int, ...]
    steps: int

    def problem(self, num_gpus: int) -> Problem:
        """Return the instance on so many GPUs; above 64 the batch grows with the GPUs."""
        factor = num_gpus // 16 if num_gpus > 64 else 1
        batch = expect(scaled(self.workload, factor), 16)
        found = all_candidates(self.memory, self.cost_model, num_gpus, int(batch.buckets[-1]), 8)
        return Problem(batch.counts, batch.buckets, found.chosen, num_gpus, self.cost_model)


def scaled(workload: Workload, factor: int) -> Workload:
    """Return the workload with its global batches multiplied."""
    sizes = {task: size * factor for task, size in workload.batch_sizes.items()}
    return replace(workload, batch_sizes=sizes)


def bench_exact(setting: Setting) -> Iterator[Row]:
    """Gap, step time and seconds of EXACT at every size, and what homogeneous plans take."""
    for num_gpus in setting.gpus:
        problem = setting.problem(num_gpus)
        start = time.perf_counter()
        reached: list[float] = []

        def progress(message: str, start: float = start, reached: list[float] = reached) -> None:
            if float(message.split("gap ")[1].split(" ")[0]) <= 1.0:
                reached.append(time.perf_counter() - start)

        found = exact.solve(problem, None, progress)
        same = homogeneous.find(problem)
        yield {
            "GPUs": num_gpus,
            "plan": str(found.plan),
            "step s": found.step_time_s,
            "bound s": found.lower_bound_s,
            "gap %": 100 * found.gap,
            "seconds": found.planner_time_s,
            "1 % after": reached[0] if reached else None,
            "homogeneous s": same.step_time_s if same else None,
            "ratio": same.step_time_s / found.step_time_s if same else None,
        }


def bench_lobra(setting: Setting) -> Iterator[Row]:
    """LobRA's methods on 16 GPUs, with its own rounding of the batch beside ours."""
    problem = setting.problem(16)
    for name, counts in (("ours", problem.counts), ("LobRA", rounded_counts(setting))):
        for proposal in (True, False):
            found = all_candidates(
                setting.memory, setting.cost_model, 16, int(problem.buckets[-1]), 8
            )
            if proposal:
                found = propose(found, setting.cost_model)
            case = replace(problem, counts=counts, candidates=found.chosen)
            for pattern in (lobra.balance, lobra.group, lobra.prune):
                result = pattern(case, 300.0)
                yield {
                    "batch": name,
                    "pattern": result.planner,
                    "layouts": "proposed" if proposal else "all",
                    "plan": str(result.plan),
                    "own objective s": result.objective_s,
                    "exact s": result.step_time_s,
                    "proven": result.proven,
                    "seconds": result.planner_time_s,
                }


def rounded_counts(setting: Setting) -> np.ndarray:
    """Return LobRA's expected batch: every task's share of every bucket rounded for itself."""
    workload = setting.workload
    buckets = plan_buckets(workload.lengths, workload.batch_sizes, 16)
    total = np.zeros(len(buckets), dtype=np.int64)
    for task, lengths in workload.lengths.items():
        counts = np.bincount(bucket_index(lengths, buckets), minlength=len(buckets))
        total += np.rint(counts / counts.sum() * workload.batch_sizes[task]).astype(np.int64)
    total[-1] = max(1, total[-1])
    return total


def bench_dispatch(setting: Setting) -> Iterator[Row]:
    """The dispatcher on sampled steps: its time, its distance to the best bound, LPT's beside."""
    cases = [(plan, 1, 832) for plan in (published_plan(setting), best_plan(setting))]
    for plan, factor, number in [*cases, (many_replicas(setting), 5, 4000)]:
        rng = np.random.default_rng(7)
        milliseconds, gaps, lpt_gaps = [], [], []
        for every in scaled(setting.workload, factor).steps(setting.steps):
            lengths = rng.permutation(every)[:number]
            start = time.perf_counter()
            found = dispatch(lengths, plan, setting.cost_model)
            milliseconds.append(1000 * (time.perf_counter() - start))
            counts = np.bincount(bucket_index(lengths, found.buckets), minlength=len(found.buckets))
            bound_s = best_bound_s(setting, plan, found.buckets, counts, found)
            gaps.append(100 * (found.step_time_s / bound_s - 1))
            greedy = lpt_times_s(lengths, found.buckets, plan, setting.cost_model).max()
            lpt_gaps.append(100 * (greedy / bound_s - 1))
        gap, lpt = np.array(gaps), np.array(lpt_gaps)
        yield {
            "plan": str(plan),
            "sequences": number,
            "steps": setting.steps,
            "median ms": float(np.median(milliseconds)),
            "max ms": max(milliseconds),
            "mean gap %": float(gap.mean()),
            "max gap %": float(gap.max()),
            "within 1 %, %": float(100 * (gap <= 1).mean()),
            "LPT mean gap %": float(lpt.mean()),
            "LPT within 1 %, %": float(100 * (lpt <= 1).mean()),
        }


def bench_packed_dispatch(setting: Setting) -> Iterator[Row]:
    """The dispatcher of packed steps: its time, and its distance to its own bound."""
    for factor, sizes, batches in PACKED_PLANS:
        groups = [group_of(setting.memory, *size) for size in sizes]
        plan = make_plan([replace(g, max_tokens=factor * g.max_tokens) for g in groups])
        costs = packed_costs(plan, setting.cost_model)
        milliseconds, processor, gaps, number = [], [], [], 0
        for lengths in scaled(setting.workload, batches).steps(setting.steps):
            number = min(len(lengths), MOST_PACKED)
            every = np.random.default_rng(number).permutation(lengths)[:number]
            start, spent = time.perf_counter(), time.process_time()
            found = dispatch_packed(every, plan, costs)
            milliseconds.append(1000 * (time.perf_counter() - start))
            processor.append(1000 * (time.process_time() - spent))
            gaps.append(100 * (found.step_time_s / found.lower_bound_s - 1))
        gap = np.array(gaps)
        yield {
            "plan": str(plan),
            "capacities": f"x{factor}",
            "sequences": number,
            "a replica": number // len(plan.replicas),
            "steps": len(gap),
            "median ms": float(np.median(milliseconds)),
            "processor ms": float(np.median(processor)),
            "least ms": min(milliseconds),
            "first ms": milliseconds[0],
            "mean gap %": float(gap.mean()),
            "95 % of gaps %": float(np.percentile(gap, 95)),
            "max gap %": float(gap.max()),
            "within 1 %, %": float(100 * (gap <= 1).mean()),
        }


def bench_ilp(setting: Setting) -> Iterator[Row]:
    """Some steps against the replica-level integer program in SCIP (20 s each)."""
    for plan in (published_plan(setting), best_plan(setting)):
        for step, lengths in enumerate(setting.workload.steps(min(setting.steps, 5))):
            found = dispatch(lengths, plan, setting.cost_model)
            counts = np.bincount(bucket_index(lengths, found.buckets), minlength=len(found.buckets))
            tables = [
                time_table(r.layout, r.max_tokens, found.buckets, setting.cost_model)
                for r in plan.replicas
            ]
            start = time.perf_counter()
            model = IdenticalModel(tables, counts, replicas=np.ones(len(tables), dtype=int))
            result = model.solve(20.0, None, 0.0)
            yield {
                "plan": str(plan),
                "step": step,
                "dispatcher s": found.step_time_s,
                "ILP s": result.objective_s,
                "ILP bound s": result.bound_s,
                "ILP seconds": time.perf_counter() - start,
                "dispatcher / bound": found.step_time_s / result.bound_s,
            }


def published_plan(setting: Setting) -> Plan:
    """Return the plan LobRA published for 7B, six tasks and 16 GPUs."""
    sizes = ((1, 1, 6), (2, 1, 1), (8, 1, 1))
    return make_plan([group_of(setting.memory, *size) for size in sizes])


def best_plan(setting: Setting) -> Plan:
    """Return the plan that EXACT found for the same."""
    return make_plan([group_of(setting.memory, *size) for size in ((8, 1, 1), (1, 8, 1))])


def best_bound_s(
    setting: Setting, plan: Plan, buckets: np.ndarray, counts: np.ndarray, found: object
) -> float:
    """Return the best bound on a plan's dispatch: columns, by bisection above its own bound."""
    tables = plan_tables(plan, buckets, setting.cost_model, counts)
    budget = Budget.of_plan(np.array([group.replicas for group in plan.groups]))
    layouts, pool = list(range(len(tables))), Pool(len(tables))
    low, high = found.lower_bound_s, found.step_time_s  # type: ignore[attr-defined]
    middle = high * (1 - 0.0098)
    while high - low > 1e-3 * high:
        if not low < middle < high:
            middle = 0.5 * (low + high)
        result = generate(
            tables,
            budget,
            counts,
            middle,
            rounding="down",
            ticks=8192,
            clock=Clock(),
            columns=pool.columns(layouts, middle),
            stop_at_proof=True,
        )
        pool.keep(layouts, result)
        if result.bound > 1 + 1e-6:
            low = middle
        else:
            high = middle
        middle = 0.5 * (low + high)
    return low


def many_replicas(setting: Setting) -> Plan:
    """Return the fluid plan of the proposed layouts for 4,160 sequences, of 64 replicas or more."""
    batch = expect(scaled(setting.workload, 5), 16)
    for num_gpus in range(64, 400, 4):
        found = all_candidates(setting.memory, setting.cost_model, num_gpus, LONGEST, 8)
        chosen = propose(found, setting.cost_model).chosen
        problem = Problem(batch.counts, batch.buckets, chosen, num_gpus, setting.cost_model)
        plan = problem.plan(FluidPlanner(problem).minimum(100.0, 1e-3).replicas)
        if len(plan.replicas) >= 64:
            return plan
    raise SystemExit("no number of GPUs gives 64 replicas")


def group_of(memory: MemoryProfile, tp: int, pp: int, replicas: int) -> ReplicaGroup:
    """Return replicas of a layout with the profile's capacity."""
    return ReplicaGroup(Layout(tp, pp), replicas, memory.max_tokens(tp, pp))


def bench_buckets(setting: Setting) -> Iterator[Row]:
    """The exact bucketing of 83,304 sequences and of one step."""
    rng = np.random.default_rng(0)
    every = np.concatenate(list(setting.workload.lengths.values()))
    for number in (832, 83_304):
        lengths = rng.choice(every, number)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            make_buckets(lengths, 16)
            seconds.append(time.perf_counter() - start)
        median_ms = 1000 * float(np.median(seconds))
        yield {"sequences": number, "buckets": 16, "median ms of 20": median_ms}


def bench_packed_plans(setting: Setting) -> Iterator[Row]:
    """Packed plans: their certified gap, seconds, and what other plans take, run packed."""
    given = {"the tasks": setting.workload}
    yield from bench_packed(setting.memory, setting.cost_model, given, setting.gpus)
    few = [number for number in setting.gpus if number <= 64]
    yield from bench_packed(setting.memory, setting.cost_model, given, few[:1], (2, 4))
    yield from bench_packed(setting.memory, setting.cost_model, hard_workloads(), few)


def bench_packed_random(setting: Setting) -> Iterator[Row]:
    """Packed plans of random instances; which tasks are asked for does not matter."""
    yield from bench_random(setting.memory, setting.cost_model)


Subject = Literal[
    "exact", "lobra", "dispatch", "packed_dispatch", "ilp", "buckets", "packed", "packed_random"
]
SUBJECTS: dict[Subject, Callable[[Setting], Iterator[Row]]] = {
    "exact": bench_exact,
    "lobra": bench_lobra,
    "dispatch": bench_dispatch,
    "packed_dispatch": bench_packed_dispatch,
    "ilp": bench_ilp,
    "buckets": bench_buckets,
    "packed": bench_packed_plans,
    "packed_random": bench_packed_random,
}


def planning(
    *,
    profile: Path,
    lengths: Path,
    subject: tuple[Subject, ...] = tuple(SUBJECTS),
    instance: Literal["6tasks", "12tasks", "real12"] = "6tasks",
    cost_model: Kind = "lobra6",
    gpus: tuple[int, ...] = SIZES,
    steps: int = 200,
) -> Iterator[Row]:
    """Measure the planner, subject by subject; each has its own columns.

    Parameters
    ----------
    profile
        A folder with LobRA's published CSV files.
    lengths
        One with the length files (``lobra_like_6tasks.json``, ...).
    subject, instance, cost_model, gpus
        What to measure.
    steps
        Sampled for the dispatcher.
    """
    config_name, lengths_name = INSTANCES[instance]
    workload = make_workload(
        load_trainer_config(config_name), load_lengths(lengths / lengths_name), LONGEST
    )
    setting = Setting(
        load_memory_profile(profile / "max_tokens_llama_7B_6tasks.csv"),
        fit_cost_model(
            load_time_profile(profile / "profile_time_llama_7B.csv"), NUM_LAYERS_7B, cost_model
        ),
        replace(workload, num_steps={}),  # so that every step has all tasks
        gpus,
        steps,
    )
    for name in subject:
        for row in SUBJECTS[name](setting):
            yield {"subject": name, **row}
    yield {"peak memory MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
