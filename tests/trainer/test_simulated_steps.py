"""The simulator's steps, and those plans are compared on, are the steps that training makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.bench import Bench
from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, make_plan
from lobra.layout.sequences import PACKED_MULTIPLE
from lobra.planner.baselines import FUSED_BUCKETS
from lobra.planner.bucketed.buckets import STATIC_BUCKETS
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.dispatch import dispatch
from lobra.planner.simulate import simulate
from lobra.planner.workload import Workload, read_workload
from lobra.tasks.task_file import load_trainer_config
from lobra.trainer.metrics import read_metrics
from lobra.trainer.prepare import prepare
from lobra.trainer.request import TrainRequest
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.trainer.command import refused, write_config, write_plan
from tests.trainer.command import train as train_command
from tests.trainer.recording import RecordedResult

SEED = 5


def set_up() -> None:
    """Three tasks: one validates, one ends early, one runs for an epoch of two data sets."""
    rng = np.random.default_rng(0)
    for name, number in (("a", 30), ("b", 17)):
        rows = [{"text": "abcdefgh"[: 1 + k % 8] * int(rng.integers(2, 9))} for k in range(number)]
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"rank": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "json_key": "text"}
    tasks = [
        {"name": "split", "dataset_name": "a", "global_batch_size": 5, "context_length": 24,
         "validation_split": 0.2, "steps": 6, "seed": 3, **common},
        {"name": "short", "dataset_name": "b", "global_batch_size": 4, "context_length": 64,
         "steps": 2, **common},
        {"name": "epochs", "dataset_name": ["b", "a"], "global_batch_size": 16,
         "context_length": 64, "max_samples": 12, "epochs": 1, **common},
    ]  # fmt: skip
    content = {"variant": "canonical", "train_task_num": 3, "task": tasks}
    Path("tasks.json").write_text(json.dumps(content))


def test_the_simulator_draws_what_training_trains(place: Path) -> None:
    set_up()
    run = prepare(
        TrainRequest(
            str(place), "tasks.json", "plan.yaml", Path("run"), device="cpu", seed=SEED,
            time_profile=Path("time.csv"), validate_every=0,
        )
    )  # fmt: skip
    (rank,) = run_local(run, "tests.trainer.recording:train_recorded")
    assert isinstance(rank, RecordedResult)
    config = load_trainer_config("tasks.json")
    by_data = read_workload(config, str(place), None, "data", 64, SEED)[0]
    every = {
        "split": lengths_in("split"), "short": lengths_in("short"), "epochs": lengths_in("epochs"),
    }  # fmt: skip
    assert {name: len(values) for name, values in by_data.lengths.items()} == {
        name: len(values) for name, values in every.items()
    }
    names = [task.name for task in run.tasks]
    for step in range(run.last_step + 2):
        trained = {
            name: sorted(
                index
                for batch in rank.trained
                if batch.step == step
                for task, index in batch.sequences
                if names[task] == name
            )
            for name in names
        }
        drawn = by_data.draw(step)
        assert {name: sorted(own.tolist()) for name, own in drawn.items()} == {
            name: own for name, own in trained.items() if own
        }
        lengths = [every[name][index] for name in names for index in trained[name]]
        simulated = next(by_data.steps(1, step), np.empty(0))
        assert sorted(lengths) == sorted(simulated.tolist())
    metrics = read_metrics(run.output_dir)
    assert [step["tokens"] for step in metrics] == [int(s.sum()) for s in by_data.steps(99)]
    for step in metrics:
        packed = sum(replica["micro_batches"] for replica in step["replicas"])
        assert 0 <= step["padded_tokens"] - step["tokens"] < PACKED_MULTIPLE * packed
    check_lengths_file(place, by_data)


def lengths_in(task: str) -> list[int]:
    """Return the lengths of what the run trained a task on."""
    return np.diff(np.load(Path("run/tokenised/training") / task / "offsets.npy")).tolist()


def check_lengths_file(base: Path, by_data: Workload) -> None:
    """Draw the same from a file with the lengths of all sequences, in the order of the data."""
    content = json.loads(Path("tasks.json").read_text())
    whole = [{**task, "validation_split": 0.0} for task in content["task"]]
    Path("whole.json").write_text(json.dumps({**content, "task": whole}))
    config = load_trainer_config("whole.json")
    every = read_workload(config, str(base), None, "data", 64, SEED)[0].lengths
    Path("lengths.json").write_text(json.dumps({n: v.tolist() for n, v in every.items()}))
    config = load_trainer_config("tasks.json")
    by_file = read_workload(config, str(base), "lengths.json", "data", 64, SEED)[0]
    for step in range(7):
        one, two = by_data.draw(step), by_file.draw(step)
        assert one.keys() == two.keys()
        assert all((one[name] == two[name]).all() for name in one)
        both = [next(work.steps(1, step), np.empty(0)) for work in (by_data, by_file)]
        assert both[0].tolist() == both[1].tolist()


def test_fixed_buckets_are_the_same_in_training_simulator_plans_and_tables(place: Path) -> None:
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (9, 40, 300, 700, 1500, 260, 520)]
    Path("data/small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config(steps=2, context_length=2048, validation_split=0.3)
    write_plan({"dp": 2, "tp": 1, "pp": 1, "max_tokens": 4096})
    for number in (7, 16):
        for seed in range(4):  # each holds out others, the longest among them
            request = TrainRequest(
                str(place), "tasks.json", "plan.yaml", Path(f"run{number}{seed}"), device="cpu",
                time_profile=Path("time.csv"), seed=seed, dp_bucket="off",
                num_buckets=number,
            )  # fmt: skip
            run = prepare(request)
            config = load_trainer_config("tasks.json")
            work = read_workload(config, str(place), None, "data", 2048, seed)[0]
            assert list(run.buckets) == expect(work, number, static=True).buckets.tolist()
            assert run.buckets == STATIC_BUCKETS[number][: len(run.buckets)]
            assert run.buckets[-2] < 1500 <= run.buckets[-1]
            costs = run.cost_model
            simulated = simulate(run.plan, work, costs, 2, num_buckets=number, static=True)
            trained = [
                dispatch(lengths, run.plan, costs, buckets=np.array(run.buckets)).padded_tokens
                for lengths in work.steps(2)
            ]
            assert simulated.padded_tokens.tolist() == trained
            if number == FUSED_BUCKETS:
                check_tables(run, work)


def check_tables(run: RunSpec, work: Workload) -> None:
    """See that the experiments' tables ask for as much room as training does."""
    tables = Bench("tiny", 2, work, None, 2)  # type: ignore[arg-type]
    for tokens, holds in ((run.buckets[-1], True), (run.buckets[-1] - 1, False)):
        group = ReplicaGroup(Layout(1, 1), 1, tokens)
        assert tables.holds(make_plan([group]), work) == holds


def test_fixed_buckets_that_are_none_or_do_not_fit(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command(place, "--dp-bucket", "off", "--num-buckets", "8") == 2
    refused(capsys, "--num-buckets 8: the fixed sets have 7 or 16 buckets")
    assert train_command(place, "--dp-bucket", "off", "--num-buckets", "7") == 2
    refused(capsys, "(40 tokens) is padded to the fixed bucket of 256", "is 64; use --dp-bucket on")
