"""Benchmarks of the planner: subject x instance x size; prints a Markdown table per subject.

On LobRA's published profile and lengths.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

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
from lobra.planner.workload import Workload, make_workload
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.layer_fit import Kind
from lobra.profiler.profiles import MemoryProfile, load_memory_profile, load_time_profile
from lobra.tasks.config import load_trainer_config
from lobra.tasks.lengths import load_lengths

INSTANCES = {
    "6tasks": ("exp_task6", "lobra_like_6tasks.json"),
    "12tasks": ("exp_task12", "lobra_like_12tasks.json"),
    "real12": ("real12", "real_12tasks.json"),
}
NUM_LAYERS_7B = 32
LONGEST = 16384
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


def bench_exact(setting: Setting) -> None:
    """Gap, step time and seconds of EXACT at every size, and what homogeneous plans take."""
    print(
        "| GPUs | plan | step s | bound s | gap % | seconds | 1 % after | homogeneous s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for num_gpus in setting.gpus:
        problem = setting.problem(num_gpus)
        start, reached = time.perf_counter(), []

        def progress(message: str, start: float = start, reached: list[float] = reached) -> None:
            if float(message.split("gap ")[1].split(" ")[0]) <= 1.0:
                reached.append(time.perf_counter() - start)

        found = exact.solve(problem, None, progress)
        same = homogeneous.find(problem)
        text = (
            f"{same.step_time_s:.3f} | {same.step_time_s / found.step_time_s:.2f}"
            if same
            else "- | -"
        )
        first = f"{reached[0]:.2f}" if reached else "-"
        print(
            f"| {num_gpus} | {found.plan} | {found.step_time_s:.4f} | {found.lower_bound_s:.4f} | "
            f"{100 * found.gap:.3f} | {found.planner_time_s:.2f} | {first} | {text} |",
            flush=True,
        )


def bench_lobra(setting: Setting) -> None:
    """LobRA's methods on 16 GPUs, with its own batch rounding beside the contract's."""
    print("| batch | pattern | layouts | plan | own objective s | exact s | proven | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    problem = setting.problem(16)
    for name, counts in (("contract", problem.counts), ("LobRA", rounded_counts(setting))):
        for proposal in (True, False):
            found = all_candidates(
                setting.memory, setting.cost_model, 16, int(problem.buckets[-1]), 8
            )
            if proposal:
                found = propose(found, setting.cost_model)
            case = replace(problem, counts=counts, candidates=found.chosen)
            for pattern in (lobra.balance, lobra.group, lobra.prune):
                result = pattern(case, 300.0)
                print(
                    f"| {name} | {result.planner} | {'proposed' if proposal else 'all'} | "
                    f"{result.plan} | {result.objective_s:.4f} | {result.step_time_s:.4f} | "
                    f"{result.proven} | {result.planner_time_s:.1f} |",
                    flush=True,
                )


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


def bench_dispatch(setting: Setting) -> None:
    """The dispatcher on sampled steps: seconds, distance to the best bound, LPT and ILP beside."""
    print(
        "| plan | sequences | steps | median ms | max ms | mean gap % | max gap % | within 1 % | "
        "LPT mean gap % | LPT within 1 % |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    memory = setting.memory
    published = make_plan(
        [group_of(memory, 1, 1, 6), group_of(memory, 2, 1, 1), group_of(memory, 8, 1, 1)]
    )
    best = make_plan([group_of(memory, 8, 1, 1), group_of(memory, 1, 8, 1)])
    cases = [(published, 1, 832), (best, 1, 832), (many_replicas(setting), 5, 4000)]
    for plan, factor, number in cases:
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
        good, lpt_good = 100 * (gap <= 1).mean(), 100 * (lpt <= 1).mean()
        print(
            f"| {plan} | {number} | {setting.steps} | {np.median(milliseconds):.1f} | "
            f"{max(milliseconds):.1f} | {gap.mean():.2f} | {gap.max():.2f} | "
            f"{good:.1f} % | {lpt.mean():.2f} | {lpt_good:.1f} % |",
            flush=True,
        )


def bench_ilp(setting: Setting) -> None:
    """Some steps against the replica-level integer program in SCIP (20 s each)."""
    print("| plan | step | dispatcher s | ILP s | ILP bound s | ILP seconds | dispatcher / bound |")
    print("|---|---|---|---|---|---|---|")
    memory = setting.memory
    plans = [
        make_plan(
            [group_of(memory, 1, 1, 6), group_of(memory, 2, 1, 1), group_of(memory, 8, 1, 1)]
        ),
        make_plan([group_of(memory, 8, 1, 1), group_of(memory, 1, 8, 1)]),
    ]
    for plan in plans:
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
            seconds = time.perf_counter() - start
            print(
                f"| {plan} | {step} | {found.step_time_s:.4f} | {result.objective_s:.4f} | "
                f"{result.bound_s:.4f} | {seconds:.1f} | "
                f"{found.step_time_s / result.bound_s:.4f} |",
                flush=True,
            )


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


def bench_buckets(setting: Setting) -> None:
    """The exact bucketing of 83,304 sequences and of one step."""
    print("| sequences | buckets | median ms of 20 |")
    print("|---|---|---|")
    rng = np.random.default_rng(0)
    every = np.concatenate(list(setting.workload.lengths.values()))
    for number in (832, 83_304):
        lengths = rng.choice(every, number)
        seconds = []
        for _ in range(20):
            start = time.perf_counter()
            make_buckets(lengths, 16)
            seconds.append(time.perf_counter() - start)
        print(f"| {number} | 16 | {1000 * np.median(seconds):.2f} |", flush=True)


SUBJECTS: dict[str, Callable[[Setting], None]] = {
    "exact": bench_exact,
    "lobra": bench_lobra,
    "dispatch": bench_dispatch,
    "ilp": bench_ilp,
    "buckets": bench_buckets,
}


def planning(
    *,
    profile: Path,
    lengths: Path,
    subject: tuple[Literal["exact", "lobra", "dispatch", "ilp", "buckets"], ...] = tuple(SUBJECTS),
    instance: Literal["6tasks", "12tasks", "real12"] = "6tasks",
    cost_model: Kind = "lobra6",
    gpus: tuple[int, ...] = SIZES,
    steps: int = 200,
) -> None:
    """Measure the planner, subject by subject; each prints its table.

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
        print(f"\n## {name}\n")
        SUBJECTS[name](setting)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
