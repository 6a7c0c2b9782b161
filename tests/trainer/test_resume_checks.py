"""What `--resume` refuses or says, before it removes anything; and what it does not need."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lobra.layout.shapes import read_shape
from lobra.model.fingerprint import fingerprint
from lobra.model.rank_results import RankError
from lobra.profiler.hardware import cpu_name
from lobra.trainer.checkpoint_folder import list_checkpoints
from lobra.trainer.metrics import read_metrics, restore_metrics
from lobra.trainer.resume_checks import DATA_FIELDS
from tests.trainer.command import train, write_config, write_plan


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with the checkpoints 1 and 2 of a task that is to make three steps."""
    write_config(steps=3)
    assert train(place, "--save-every", "1", "--max-steps", "2") == 0
    assert list_checkpoints(Path("run")) == [1, 2]
    return place


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run that would start end with exit code 1 instead."""

    def fail(_run: object) -> None:
        raise RankError(1, "the process was killed by SIGKILL")

    monkeypatch.setattr("lobra.trainer.run.run_local", fail)


def change_state(step: int, **changes: Any) -> None:
    """Change a checkpoint's state, as an older version wrote it; None removes a field."""
    path = Path(f"run/checkpoints/step_{step}/state.json")
    state = {**json.loads(path.read_text()), "format": 2, "seal": None, **changes}
    path.write_text(json.dumps({name: v for name, v in state.items() if v is not None}))


def test_another_base_model_is_refused_whichever_tensors_differ(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    tensors = load_file(run / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert train(other, "--resume", "1") == 2
    assert "--model is not the base model" in capsys.readouterr().err
    assert list_checkpoints(Path("run")) == [1, 2]


def test_a_checkpoint_of_an_older_version_goes_on(
    run: Path, accepted: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_state(2, base_model=fingerprint(run, read_shape(run), like=""))
    assert train(run, "--resume") == 1
    assert "of an older version" in caplog.text
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "config.json").write_text((run / "config.json").read_text() + "\n")
    assert train(other, "--resume") == 2


def test_the_adapter_a_task_started_from_is_not_needed_again(run: Path, accepted: None) -> None:
    """As if the run had started from it: the checkpoint holds what has become of it."""
    write_config(steps=3, resume_from="adapters/gone")
    assert train(run, "--resume") == 1
    assert train(run, "--output-dir", "new") == 2


def test_a_plan_need_not_hold_the_sequences_of_a_task_that_is_over(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/long.jsonl").write_text(Path("data/small.jsonl").read_text())
    Path("data/small.jsonl").write_text(Path("data/long.jsonl").read_text().splitlines()[0] + "\n")
    write_config(steps=3)
    content = json.loads(Path("tasks.json").read_text())
    short = {**content["task"][0], "name": "short"}
    for steps, code in ((1, 0), (2, 2)):  # with one more step, the long one is not over
        long = {**short, "name": "long", "dataset_name": "long", "steps": steps}
        tasks = {**content, "train_task_num": 2, "task": [short, long]}
        Path("tasks.json").write_text(json.dumps(tasks))
        if steps == 1:
            assert train(place, "--max-steps", "2") == 0
            write_plan({"dp": 1, "tp": 1, "pp": 1, "max_tokens": 16})
        assert train(place, "--resume", "2") == code
    assert "1 of 2 sequences of task long are longer" in capsys.readouterr().err


def test_tasks_listed_in_another_order_go_on(place: Path) -> None:
    write_config(steps=3)
    content = json.loads(Path("tasks.json").read_text())
    tasks = [{**content["task"][0], "name": name, "steps": n} for name, n in (("a", 1), ("b", 3))]
    for listed, more in ((tasks, ["--max-steps", "2"]), (tasks[::-1], ["--resume"])):
        Path("tasks.json").write_text(json.dumps({**content, "train_task_num": 2, "task": listed}))
        assert train(place, *more) == 0
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    made = [{name: task["own_step"] for name, task in line["tasks"].items()} for line in lines]
    assert made == [{"a": 0, "b": 0}, {"b": 1}, {"b": 2}]
    moments = load_file("run/checkpoints/step_3/moments/a.safetensors")
    before = load_file("run/checkpoints/step_2/moments/a.safetensors")
    assert all(torch.equal(before[key], value) for key, value in moments.items())


def test_a_damaged_log_never_blocks_a_run(
    run: Path, accepted: None, caplog: pytest.LogCaptureFixture
) -> None:
    path, aside = Path("run/metrics.jsonl"), Path("run/metrics.jsonl.damaged")
    one, two = path.read_text().splitlines()
    last = json.loads(Path("run/checkpoints/step_2/state.json").read_text())["last_metrics"]
    other = json.loads(two)
    other["tasks"]["small"]["loss"] += 1
    for text, said, kept in (
        ("{" + one + "\n" + two + "\n", "metrics.jsonl:1: not a step's line", [1]),
        ("7\n" + two + "\n", "metrics.jsonl:1: not a step's line: holds 7", [1]),
        (one + "\n[1]\n" + two + "\n", "metrics.jsonl:2: not a step's line: holds [1]", [0, 1]),
        (two + "\n" + one + "\n", "step 0 after step 1", [1]),
        (one + "\n" + one + "\n", "step 0 after step 0", [0, 1]),
        (one + "\n" + json.dumps(other) + "\n", "is of another run", [1]),
        ("\udcff\n" + two, "metrics.jsonl:1: not a step's line", [1]),
    ):
        path.write_text(text, errors="surrogateescape")
        caplog.clear()
        assert train(run, "--resume", "2") == 1
        assert said in caplog.text
        assert list_checkpoints(Path("run")) == [1, 2]
        assert path.read_text(errors="surrogateescape") == text
        restore_metrics(Path("run"), 2, last)
        assert [step["step"] for step in read_metrics(Path("run"))] == kept
        assert aside.read_text(errors="surrogateescape") == text
    path.unlink()
    assert train(run, "--resume", "2") == 1
    assert "lacks 1 of the steps so far, the first of them step 1;" in caplog.text


def test_another_precision_is_said(
    run: Path, accepted: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(run, "--resume", "--precision", "fp32") == 1
    assert "goes on in" not in caplog.text
    assert train(run, "--resume", "--precision", "fp64") == 1
    assert "goes on in fp64, so far it was in fp32" in caplog.text
    caplog.clear()
    change_state(2, precision=None)  # as older versions have it
    assert train(run, "--resume", "--precision", "fp64") == 1
    assert "goes on in" not in caplog.text


def test_other_versions_and_another_profile_are_said_in_one_message(
    run: Path, accepted: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(run, "--resume") == 1
    assert "goes on with" not in caplog.text
    path = Path("run/config.yaml")
    config = yaml.safe_load(path.read_text())
    assert config["digests"]["base_model"] == fingerprint(run, read_shape(run))
    assert list(config["digests"]["data"]) == ["small"]
    config["versions"] |= {"torch": "1.0", "machine": "an abacus"}
    path.write_text(yaml.safe_dump(config))
    with Path("time.csv").open("a") as file:
        file.write("1,256,1,9\n")
    assert train(run, "--resume") == 1
    (said,) = [m for m in caplog.messages if "goes on with" in m]
    assert f"machine {cpu_name()} (before: an abacus)" in said
    assert f"torch {torch.__version__} (before: 1.0), another time profile (before: time" in said


def test_what_made_the_data_others_is_named(
    run: Path, accepted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, said in (
        ({"validation_split": 0.5}, "task small: validation_split is 0.5, in the checkpoint 0.0"),
        ({"context_length": 32}, "task small: context_length is 32, in the checkpoint 64"),
        ({"seed": 3, "validation_split": 0.5}, "task small: seed is 3, in the checkpoint 0"),
    ):
        write_config(steps=3, **change)
        assert train(run, "--resume") == 2
        message = capsys.readouterr().err
        assert said in message
        assert "data set" not in message and "sha256" not in message
    write_config(steps=3, context_length=63)  # cuts nothing, so the data are the same
    assert train(run, "--resume") == 1
    write_config(steps=3)
    rows = Path("data/small.jsonl").read_text().replace("[3, 4", "[4, 3")
    Path("data/small.jsonl").write_text(rows)
    assert train(run, "--resume") == 2
    message = capsys.readouterr().err
    assert "task small: its data set 'small' is not what the checkpoint was trained on" in message
    assert "2 sequences to train on then, 2 now" in message
    assert "start a new run" in message and "sha256" not in message
    assert message.count("--resume: task") == 1


def test_a_checkpoint_that_does_not_say_how_its_data_were_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("run/checkpoints/step_2/state.json")
    (record,) = json.loads(path.read_text())["tasks"]
    old = {n: v for n, v in record.items() if n not in DATA_FIELDS}
    change_state(2, tasks=[old])
    write_config(steps=3, validation_split=0.5)
    assert train(run, "--resume") == 2
    assert "or the task's dataset_name, json_key, " in capsys.readouterr().err
