from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lobra.commands.simulate import SimulateOptions
from lobra.commands.simulate import simulate as run_simulation
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, make_plan, save_plan
from lobra.planner.candidates import Candidate
from lobra.planner.dispatch import dispatch
from lobra.planner.evaluate import sync_time_s
from lobra.planner.explain import roles
from lobra.planner.planners.base import Problem
from lobra.planner.simulate import baselines, chrome_trace, ladder, lpt_times_s, simulate
from lobra.planner.sweep import parse_range
from lobra.planner.workload import Workload, expect
from lobra.profiler.collectives import SYNC, Collectives, Link
from lobra.profiler.cost_model import fit_cost_model
from lobra.profiler.profiles import TimeProfile
from tests.commands.test_plan import files  # noqa: F401 (a fixture)
from tests.planner.support import plain_cost_model

PLAN = make_plan([ReplicaGroup(Layout(1, 1), 2, 1024), ReplicaGroup(Layout(1, 2), 1, 4096)])


def workload() -> Workload:
    rng = np.random.default_rng(0)
    lengths = {"short": rng.integers(10, 300, 500), "long": rng.integers(10, 3000, 500)}
    return Workload(lengths, {"short": 20, "long": 10}, {"short": 0, "long": 0})


def test_steps_draw_every_sequence_once_per_epoch() -> None:
    work = Workload({"a": np.arange(1, 13)}, {"a": 4}, {"a": 0})
    drawn = np.concatenate(list(work.steps(3)))
    assert sorted(drawn.tolist()) == list(range(1, 13))


def test_a_simulation_is_the_dispatcher_step_by_step() -> None:
    cost_model = plain_cost_model()
    found = simulate(PLAN, workload(), cost_model, 4, first_step=3)
    expected = [
        dispatch(lengths, PLAN, cost_model).step_time_s for lengths in workload().steps(4, 3)
    ]
    assert found.step_time_s.tolist() == expected
    summary = found.summary()
    assert summary["mean_s"] == pytest.approx(np.mean(expected))
    assert 0 <= summary["idle"] < 1
    assert 0 <= summary["padding"] < 1
    assert summary["gpu_seconds"] == pytest.approx(4 * np.mean(expected))


def test_baselines_and_ladder_run_on_the_same_steps() -> None:
    cost_model = plain_cost_model()
    candidates = (Candidate(Layout(1, 1), 1024), Candidate(Layout(1, 2), 4096))
    same, left_out = baselines(workload(), candidates, cost_model, 4, 3)
    assert [run.name for run in same] == [
        "Task-Sequential, 7 fixed buckets",
        "Task-Fused, 7 fixed buckets",
    ]
    rungs, others = ladder(PLAN, workload(), cost_model, 3)
    assert left_out == others == []
    tokens = {tuple(run.tokens.tolist()) for run in [*same, *rungs]}
    assert len(tokens) == 1
    for found in [*same, *rungs]:
        assert (found.padded_tokens >= found.tokens).all()


def test_greedy_dispatch_keeps_sequences_off_replicas_that_cannot_hold_them() -> None:
    cost_model = plain_cost_model()
    times = lpt_times_s(np.array([3000, 3000]), np.array([3008]), PLAN, cost_model)
    assert (times[:2] == 0).all() and times[2] > 0
    with pytest.raises(ConfigError, match="fits no replica"):
        lpt_times_s(np.array([5000]), np.array([5008]), PLAN, cost_model)


def test_the_trace_fills_each_replicas_time() -> None:
    cost_model = plain_cost_model()
    found = dispatch(next(workload().steps(1)), PLAN, cost_model)
    trace = chrome_trace(found, PLAN, cost_model)
    for replica, time_s in enumerate(found.replica_time_s):
        spans = [e for e in trace["traceEvents"] if e["pid"] == replica and e["ph"] == "X"]
        assert sum(e["dur"] for e in spans) == pytest.approx(1e6 * time_s)


def test_roles_add_up_to_the_batch() -> None:
    cost_model = plain_cost_model()
    batch = expect(workload(), 6)
    candidates = (Candidate(Layout(1, 1), 1024), Candidate(Layout(1, 2), 4096))
    problem = Problem(batch.counts, batch.buckets, candidates, 4, cost_model)
    found = roles(problem, PLAN)
    assert sum(role.tokens_share for role in found) == pytest.approx(1.0)
    assert "the only one that holds" in found[1].reason


@pytest.mark.parametrize("text", ["8", "8-64", "64:8", "0:8", "8:64:0", "a:b"])
def test_a_sweep_that_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep-gpus"):
        parse_range(text)


def test_a_sweep_has_about_fifteen_points() -> None:
    assert parse_range("8:64:8") == list(range(8, 65, 8))
    assert parse_range("4:10") == list(range(4, 11))
    assert len(parse_range("8:1024")) <= 15


def test_lobra_simulate_writes_its_three_files(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan([ReplicaGroup(Layout(1, 1), 2, 1024), ReplicaGroup(Layout(2, 1), 1, 2048)])
    save_plan(plan, files / "plan.yaml")
    options = SimulateOptions(
        model="tiny", trainer_config="config.json", strategy_config="plan.yaml",
        time_profile=Path("time.csv"), memory_profile=Path("memory.csv"),
        lengths=Path("lengths.json"), steps=3, output_dir=Path("sim"), json=True,
    )  # fmt: skip
    assert run_simulation(options=options) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in result["runs"]] == [3] * len(result["runs"])
    assert json.loads((files / "sim/trace.json").read_text())["traceEvents"]
    rows = (files / "sim/steps.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * len(result["runs"])
    assert json.loads((files / "sim/simulation.json").read_text()) == result["runs"]
    without = replace(options, memory_profile=None, output_dir=None)
    assert run_simulation(options=without) == 0
    (reason,) = json.loads(capsys.readouterr().out)["left_out"]
    assert "max_tokens_tiny_2tasks.csv: no such profile" in reason
    found = files / "exp_result/profile/memory/max_tokens_tiny_2tasks.csv"
    found.parent.mkdir(parents=True)
    (files / "memory.csv").rename(found)
    assert run_simulation(options=without) == 0
    again = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in again] == [run["name"] for run in result["runs"]]
    wrong = replace(options, steps=0, seed=-1, num_buckets=0, output_dir=Path("time.csv/sim"))
    with pytest.raises(ConfigError) as caught:
        run_simulation(options=wrong)
    for words in ("--steps 0", "--seed -1", "--num-buckets 0", "--output-dir: time.csv/sim"):
        assert words in str(caught.value)


def test_synchronisation_is_added_where_it_was_profiled() -> None:
    """Once a step, for all ranks that hold a layer; the published cost model has no such term."""
    links = Collectives({(SYNC, 2): Link(5.0, 0.0), (SYNC, 4): Link(9.0, 1e-6)}, 1.0)
    rows = np.array([(tp, s, b) for tp in (1, 2) for s in (64, 128, 256) for b in (1, 2, 4)])
    profile = TimeProfile(*rows.T, 1.0 + 0.01 * rows[:, 1] * rows[:, 2] / rows[:, 0])
    plain = fit_cost_model(profile, 4)
    plan = make_plan([ReplicaGroup(Layout(1, 2), 2, 512), ReplicaGroup(Layout(2, 2), 1, 512)])
    assert sync_time_s(plan, plain.for_training(None, 1e6)) == 0
    model = fit_cost_model(profile, 4, collectives=links).for_training(None, 1e6)
    half = 1e6 * 4 / 2  # bytes of two of the four layers
    assert sync_time_s(plan, model) == pytest.approx((9.0 + 1e-6 * half) / 1000)
    work = Workload({"t": np.full(8, 100)}, {"t": 4}, {})
    run = simulate(plan, work, model, 2)
    assert run.step_time_s == pytest.approx(run.busy_s.max(axis=1) + sync_time_s(plan, model))


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
