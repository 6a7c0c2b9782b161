"""The simulator's steps, and those plans are compared on, are the steps that training makes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lobra.planner.workload import Workload, read_workload
from lobra.tasks.config import load_trainer_config
from lobra.trainer.prepare import TrainRequest
from lobra.trainer.run import train

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
    run, (rank,) = train(
        TrainRequest(
            str(place), "tasks.json", "plan.yaml", Path("run"), device="cpu", seed=SEED,
            time_profile=Path("time.csv"), record_sequences=True, validate_every=0,
        )
    )  # fmt: skip
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
                int(index)
                for batch in rank.trained
                if batch.step == step
                for task, index in zip(batch.tasks, batch.indices, strict=True)
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
    assert [step.tokens for step in rank.steps] == [int(s.sum()) for s in by_data.steps(99)]
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
