"""The experiments end to end, small: tables, resumption, sources, commands of the real jobs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import jobs, simulate
from experiments.bench import Bench, dealt_time_s
from experiments.cells import Cell, CellStore, Workers, start_workers
from experiments.inputs import Lengths, Sources, find_costs, find_lengths, setup_of, workload_of
from experiments.methods import DYNAMIC, FUSED, PACKED
from experiments.provenance import read_provenance
from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.placement import place
from lobra.layout.plan import ReplicaGroup, make_plan
from lobra.profiler.cost_model import fit_cost_model
from lobra.profiler.profiles import TimeProfile
from tests.planner.support import replica_time_s

LENGTHS = {  # few sequences, all short but some: enough for every method to differ
    name: [64 + 7 * k for k in range(120)] + [1500] * 6 + [longest] * 2
    for name, longest in {
        "dolly": 8000,
        "evol_instruct": 16000,
        "xsum": 9000,
        "commitpackft": 2000,
        "meetingbank": 16000,
        "python_code_instructions": 12000,
    }.items()
}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "lengths.json").write_text(json.dumps(LENGTHS), encoding="utf-8")
    command = [sys.executable, "-m", "lobra", "experiment", "simulate", "7B"]
    command += ["--output", str(folder / "out"), "--steps", "4", "--time-limit", "0.3"]
    command += ["--lengths", str(folder / "lengths.json")]
    done = subprocess.run(
        command, cwd=project_root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_every_table_is_there_and_adds_up(finished: Path) -> None:
    methods = {row["method"]: row for row in rows_of(finished / "methods.csv")}
    steps = rows_of(finished / "steps.csv")
    for name, row in methods.items():
        own = [float(step["step_time_s"]) for step in steps if step["method"] == name]
        assert len(own) == 4
        assert float(row["step_time_s"]) == pytest.approx(np.mean(own), abs=2e-6)
        assert float(row["gpu_seconds"]) == pytest.approx(
            float(row["step_time_s"]) * int(row["num_gpus"]), rel=1e-4
        )
    fused, ours = methods["Task-Fused"], methods["our plan"]
    saved = 1 - float(ours["gpu_seconds"]) / float(fused["gpu_seconds"])
    assert float(ours["less_than_fused"]) == pytest.approx(saved, abs=1e-4)
    assert float(methods["Task-Fused, our dispatch"]["step_time_s"]) <= float(fused["step_time_s"])
    packed = [methods[name] for name in PACKED.values()]
    needed = [float(row["gpu_seconds"]) for row in packed]
    assert max(needed) < float(ours["gpu_seconds"])  # nothing is padded
    assert needed[-1] < needed[0]  # with four times the memory
    for row in packed:
        assert float(row["padding"]) < float(ours["padding"])
        assert 0 < float(row["lower_bound_s"]) <= float(row["planned_step_time_s"])
    for row in rows_of(finished / "sequential.csv"):
        assert row["published_plan_fits"] == "True"
    # all methods were given the same sequences
    tokens = {s["tokens"] for s in steps if s["step"] == "2"}
    assert len(tokens) == 1
    padding = [
        float(row["padding"])
        for row in rows_of(finished / "buckets.csv")
        if row["plan_of"] == "ours"
    ]
    assert padding == sorted(padding, reverse=True)


def test_all_gpus_there_are_are_paid_for(finished: Path) -> None:
    for table in ("methods", "ablation", "buckets"):
        for row in rows_of(finished / f"{table}.csv"):
            assert int(row["num_gpus"]) == 16 and int(row["gpus_used"]) <= 16


def test_ablation_changes_one_thing_at_a_time(finished: Path) -> None:
    rows = rows_of(finished / "ablation.csv")
    fused = [(row["rung"], row["buckets"]) for row in rows if row["plan_of"] == "homogeneous"]
    assert fused == [
        ("dealt evenly, as published", "7 fixed"),
        ("dealt evenly", "16 fixed"),
        ("balanced + dynamic buckets", "16 dynamic"),
    ]
    methods = {row["method"]: row for row in rows_of(finished / "methods.csv")}
    last = rows[2]
    assert last["gpu_seconds"] == methods[FUSED + DYNAMIC]["gpu_seconds"]
    assert float(rows[1]["less_than_fused_16_fixed"]) == 0.0


def test_provenance_says_how_and_from_what(finished: Path) -> None:
    about = json.loads((finished / "provenance.json").read_text(encoding="utf-8"))
    assert about["complete"] is True
    assert about["command"].startswith("lobra experiment simulate 7B --output ")
    assert set(about["environment"].values()) <= {"set", "not set"}
    assert about["processor_seconds_of_all_cells"] > 0
    (entry,) = rows_of(finished / "runs.csv")
    assert entry["cells"] == entry["computed"] == str(about["cells"])


def test_planning_rows_have_both_objectives(finished: Path) -> None:
    for row in rows_of(finished / "planning_time.csv"):
        if row["failed"]:
            continue
        assert int(row["gpus_used"]) <= 16
        assert float(row["seconds"]) >= float(row["search_s"]) - 1e-3
        if row["own_bound_s"]:
            assert float(row["own_bound_s"]) <= float(row["objective_s"]) + 1e-6


def test_other_sources_leave_no_older_tables(tmp_path: Path) -> None:
    """A run with another seed that is interrupted leaves nothing of the run before."""
    options = simulate.SimulationOptions("7B", output=tmp_path, steps=2)
    path = tmp_path / "lengths.json"
    path.write_text(json.dumps(LENGTHS), encoding="utf-8")
    sources = Sources(lengths=path)

    def begun(seed: int) -> dict[str, object]:
        simulate.Experiment(replace(options, seed=seed), sources, Workers(1)).begin()
        return dict(read_provenance(tmp_path))

    begun(0)
    (tmp_path / "methods.csv").write_text("a\n1\n", encoding="utf-8")
    begun(0)
    assert (tmp_path / "methods.csv").is_file()  # resumed
    found = begun(5)
    assert not (tmp_path / "methods.csv").exists()
    assert found["complete"] is False and found["seed"] == 5


def test_plans_are_kept_when_only_the_steps_change(tmp_path: Path) -> None:
    CALLS.clear()
    free = Cell("plan", counted, ("plan",), {"n": "plan"}, free_of=("steps",))
    bound = Cell("run", counted, ("run",), {"n": "run"})
    for steps in (1, 2):
        CellStore(tmp_path, {"steps": steps, "code": 1}, lambda line: None).get([free, bound])
    assert CALLS == ["plan", "run", "run"]


@pytest.mark.parametrize("words", [["--seed", "-3"], ["--steps", "1"], ["--workers", "0"]])
def test_wrong_numbers_are_a_users_mistake(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", "simulate", "7B", "--output", str(tmp_path), *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_timeline_fills_every_replica_once(finished: Path) -> None:
    rows = rows_of(finished / "timeline.csv")
    by_replica: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        key = (row["plan_of"], row["replica"])
        by_replica.setdefault(key, []).append((float(row["start_s"]), float(row["end_s"])))
    for spans in by_replica.values():
        for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
            assert start == pytest.approx(end, abs=1e-5)


CALLS: list[str] = []


def counted(name: str) -> dict[str, object]:
    """Return a record, remembering in this process that it was computed."""
    CALLS.append(name)
    return {"value": (1, 2), "name": name}


def test_finished_cells_are_kept_and_torn_ones_made_again(tmp_path: Path) -> None:
    lines: list[str] = []
    CALLS.clear()
    cells = [Cell(f"cell {n}", counted, (n,), {"n": n.lower()}) for n in ("a", "b", "A")]
    store = CellStore(tmp_path, {"seed": 1}, lines.append)
    records = store.get(cells, "all")
    assert [r["value"] for r in records] == [[1, 2]] * 3
    assert CALLS == ["a", "b"]  # A has a's key: the same cell under another label
    assert store.get(cells) == records and len(CALLS) == 2
    assert len(store.used) == 2 and all(path.is_file() for path in store.used)
    (tmp_path / f"{cells[0].name}.json").write_text('{"context": {"seed"', encoding="utf-8")
    store.get(cells)
    CellStore(tmp_path, {"seed": 2}, lines.append).get(cells)
    assert CALLS == ["a", "b", "a", "a", "b"]


def test_worker_processes_compute_the_same_records(tmp_path: Path) -> None:
    cells = [Cell(f"cell {k}", moments_of, (k,), {"k": k}) for k in range(5)]
    here = _sums(CellStore(tmp_path / "here", {}, lambda line: None).get(cells))
    with start_workers(2) as workers:
        store = CellStore(tmp_path / "there", {}, lambda line: None, workers)
        assert _sums(store.get(cells)) == here
        wrong = Cell("wrong", moments_of, (-1,), {"k": -1})
        with pytest.raises(ConfigError, match="negative"):
            store.get([*cells, wrong])


def _sums(records: list[dict[str, object]]) -> list[object]:
    return [record["sum"] for record in records]


def moments_of(k: int) -> dict[str, object]:
    """Return something a worker process can compute."""
    if k < 0:
        raise ConfigError("a negative number")
    return {"sum": float(np.arange(k).sum())}


def test_dealing_gives_every_replica_its_share_of_every_bucket() -> None:
    profile = TimeProfile(
        np.array([1, 1, 1, 1]), np.array([64, 128, 64, 128]), np.array([1, 1, 2, 2]), np.ones(4)
    )
    costs = fit_cost_model(profile, 2)
    plan = make_plan([ReplicaGroup(Layout(1, 2), 3, 128)])
    buckets, counts = np.array([64, 128]), np.array([8, 4])
    times = dealt_time_s(counts, buckets, plan, costs)
    dealt = [((2, 1), (2, 1)), ((2, 1), (1,)), ((2,), (1,))]  # 3 3 2 short ones, 2 1 1 long ones
    for own, (short, long) in zip(times, dealt, strict=True):
        # two short ones are computed together, a long one alone
        batches = [(n, 64) for n in short] + [(1, 128)] * (2 if long == (2, 1) else 1)
        assert own == pytest.approx(replica_time_s(Layout(1, 2), batches, costs))
    assert times[0] == times.max()  # the first replica has the ceiling of every bucket
    mixed = make_plan([ReplicaGroup(Layout(1, 1), 1, 128), ReplicaGroup(Layout(1, 2), 1, 128)])
    with pytest.raises(ValueError, match="more than one layout"):
        dealt_time_s(counts, buckets, mixed, costs)


def test_estimates_say_so_and_hold_the_published_plans(tmp_path: Path) -> None:
    setup, config = setup_of("32B")
    costs = find_costs("32B", str(config.path), 12, Sources(), tmp_path)
    assert "ESTIMATE" in costs.source
    lengths = {task.name: np.array([100, 16000]) for task in config.tasks}
    workload = workload_of(config, Lengths(lengths, "test"), 0)
    bench = Bench("32B", 64, workload, costs, 2)
    for text in (setup.fused, setup.lobra):
        plan = bench.published_plan(text)
        assert plan.num_gpus == 64
        assert len(place(plan, 8).replicas) == len(plan.replicas)
    powers = bench.in_powers_of_two()
    for fine, rounded in zip(costs.memory.rows, powers.costs.memory.rows, strict=True):
        assert rounded.max_tokens <= fine.max_tokens < max(1, 2 * rounded.max_tokens)
        assert rounded.max_tokens & (rounded.max_tokens - 1) == 0
    assert powers.in_powers_of_two() is powers


def test_7b_is_simulated_on_the_published_profile(tmp_path: Path) -> None:
    _, config = setup_of("7B")
    costs = find_costs("7B", str(config.path), 6, Sources(), tmp_path)
    assert costs.source == "published profile of Llama2-7B on A100-40GB"
    assert costs.memory.max_tokens(8, 1) == 16384 and not any(tmp_path.iterdir())
    costs = find_costs("7B", str(config.path), 6, Sources(estimate=True), tmp_path)
    assert "ESTIMATE for A100-40GB" in costs.source


def test_wrong_folders_are_a_users_mistake(tmp_path: Path) -> None:
    _, config = setup_of("7B")
    with pytest.raises(ConfigError, match="no lengths at"):
        find_lengths("7B", config, Sources(lengths=tmp_path / "none"), 0)


def test_environment_names_the_sources(tmp_path: Path) -> None:
    options = simulate.SimulationOptions("7B", output=tmp_path)
    assert simulate.sources_of(options, {"LOBRA_LENGTHS": "b"}).lengths == Path("b")
    assert (
        simulate.sources_of(replace(options, synthetic=True), {"LOBRA_LENGTHS": "b"}).lengths
        is None
    )


def test_real_jobs_cover_every_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = jobs.JobOptions("7B", output=tmp_path / "real", dry_run=True)
    assert jobs.real(options) == 0
    lines = capsys.readouterr().out.splitlines()
    trained = [line for line in lines if line.startswith("lobra train")]
    assert len(trained) == 1 + 6 + 2 * 3
    assert sum("--num-buckets 7" in line for line in trained) == 7
    assert all("--batching bucketed" in line for line in trained)
    assert any(line.startswith("EXPR_DEPLOY_PATTERN=PRUNE") for line in lines)
    assert not (tmp_path / "real").exists()
    assert jobs.real(replace(options, seed=7)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("--seed 7" in line for line in lines if line.startswith("lobra train"))
    with pytest.raises(ConfigError, match="--steps: 22"):
        jobs.real(replace(options, steps=22))


def test_every_real_run_is_in_a_table(tmp_path: Path) -> None:
    setup, config = setup_of("7B")
    options = jobs.JobOptions("7B", output=tmp_path, steps=4)
    names = [job.name.removeprefix("train ") for job in jobs.train_jobs(setup, config, options)]
    for number, name in enumerate(names):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        steps = [
            {
                "step": step,
                "step_time_s": 100.0 if step == 0 else 1.0 + number + 0.1 * step,
                "tokens": 90,
                "padded_tokens": 100,
                "dispatch_time_s": 0.01,
                "replicas": [{"layout": "<8,1>", "busy_s": 0.5}] * 2,
            }
            for step in range(4)
        ]
        text = "".join(json.dumps(step) + "\n" for step in steps)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    jobs.collect(setup, config, options)
    methods = {row["method"]: row for row in rows_of(tmp_path / "methods.csv")}
    assert list(methods) == ["Task-Sequential", "Task-Fused", "LobRA's plan", "our plan"]
    # the first step, a hundred seconds, is not counted
    assert float(methods["Task-Fused"]["step_time_s"]) == pytest.approx(1.2)
    assert float(methods["Task-Sequential"]["step_time_s"]) == pytest.approx(6 * 1.2 + 21)
    ablation = [(row["plan_of"], row["rung"]) for row in rows_of(tmp_path / "ablation.csv")]
    assert len(ablation) == 1 + 2 * 3 and ablation[0][0] == "homogeneous"
    times = {float(row["step_time_s"]) for row in rows_of(tmp_path / "ablation.csv")}
    assert len(times) == 7  # each from a run of its own


def test_a_run_is_finished_when_all_its_steps_are_there(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    job = jobs.Job("t", ("true",), {}, path, 2)
    assert not job.is_finished()
    path.write_text('{"step": 0, "step_time_s": 1}\n{"step": 1, "step_ti', encoding="utf-8")
    assert not job.is_finished()
    path.write_text('{"step_time_s": 1}\n{"step_time_s": 2}\n', encoding="utf-8")
    assert job.is_finished()


def test_help_of_the_scripts_has_both_modes(project_root: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(project_root / "experiments" / "expr_32b.sh"), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "VIRTUAL_ENV": "x"},
        timeout=120,
        check=True,
    )
    for word in ("--simulate", "--dry-run", "--time-limit", "--warm-up", "LOBRA_LENGTHS"):
        assert word in done.stdout


@pytest.mark.parametrize("name", ["7b", "32b", "70b"])
def test_scripts_hand_on_their_arguments(name: str, project_root: Path) -> None:
    script = project_root / "experiments" / f"expr_{name}.sh"
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    done = subprocess.run(
        ["bash", str(script), "--simulate", "--steps", "1"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "--steps 1: want an integer of 2 or more" in done.stderr
