"""Trackers get every step and the configuration, as the real libraries read them; none ends a run.

Without a network: what the libraries write to a folder is read back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lobra.common.errors import ConfigError
from lobra.trainer import tensorboard, trackers
from lobra.trainer.trackers import OwnThread, open_tracker, trackers_of
from tests.trainer.test_forecast import step

CONFIG = {"seed": 7, "tasks": [{"name": "a", "target_modules": ["q_proj"]}], "buckets": None}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text(yaml.safe_dump(CONFIG))
    return SimpleNamespace(output_dir=tmp_path / "mine")


def write_two_runs(name: str, run: Any) -> None:
    """Write a run of two steps, which then goes on for another."""
    for begin, end in ((0, 2), (2, 3)):
        tracker = open_tracker(name, run, begin)
        for number in range(begin, end):
            tracker.write(replace(step({"a": 1.0}, 2.0), step=number))
        tracker.close(failed=end == 3)


def test_tensorboard_has_curves_and_configuration(run: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_two_runs("tensorboard", run)
    events = EventAccumulator(str(run.output_dir / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss/a")] == [2.5] * 3
    (first, _) = events.Tensors("config/text_summary")
    assert "seed: 7" in first.tensor_proto.string_val[0].decode()


def test_a_long_run_has_fewer_steps_of_a_curve(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files grow with the logarithm of the steps; what is measured seldom stays whole."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(tensorboard, "VALUES_A_STRIDE", 40)
    tracker = tensorboard.TensorBoard(run.output_dir, CONFIG, 0)
    for number in range(400):
        values = {"loss/a": 1.0, "loss/b": 2.0}
        tracker.write(values | ({} if number % 7 else {"validation_loss/a": 3.0}), number)
    tracker.close(failed=False)
    events = EventAccumulator(str(run.output_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("loss/a")]
    assert [event.step for event in events.Scalars("loss/b")] == steps
    assert steps[:15] == list(range(15)) and len(steps) < 100
    strides = [after - before for before, after in pairwise(steps)]
    assert strides == sorted(strides) and {1, 2, 4, 8} <= set(strides)
    assert [e.step for e in events.Scalars("validation_loss/a")] == list(range(0, 400, 7))


@pytest.mark.long
def test_mlflow_has_curves_and_configuration(run: Any) -> None:
    mlflow = pytest.importorskip("mlflow")
    write_two_runs("mlflow", run)
    client = mlflow.MlflowClient(tracking_uri=(run.output_dir / "mlflow/tracking").as_uri())
    experiment = client.get_experiment_by_name("lobra")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mine" and found.info.status == "FAILED"
    assert found.data.params["seed"] == "7"
    assert found.data.params["tasks.0.target_modules.0"] == "q_proj"
    history = client.get_metric_history(found.info.run_id, "loss/a")
    assert [(point.step, point.value) for point in history] == [(0, 2.5), (1, 2.5), (2, 2.5)]


@pytest.mark.long
def test_wandb_without_a_key_keeps_curves_and_configuration(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    write_two_runs("wandb", run)
    assert "kept in" in caplog.text and "wandb sync" in caplog.text
    assert "failed" not in caplog.text
    files = list((run.output_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1, "one run, gone on with"
    for path in files:
        content = path.read_bytes()
        assert b"loss/a" in content and b"target_modules" in content


class Recording:
    """A tracker that fails from its second step on, and after a while."""

    def __init__(self, fails: bool, gate: threading.Event) -> None:
        self.fails, self.gate = fails, gate
        self.written: list[dict[str, float]] = []
        self.closed = False

    def write(self, values: dict[str, float], step: int) -> None:
        assert self.gate.wait(10)
        if self.fails and self.written:
            raise ConnectionError("the network is gone")
        self.written.append(values)

    def close(self, failed: bool) -> None:
        self.closed = not failed


def test_a_tracker_that_fails_or_is_slow_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    bad, good = Recording(True, gate), Recording(False, gate)
    both = OwnThread("bad", lambda: bad), OwnThread("good", lambda: good)
    for _ in range(3):
        for tracker in both:
            tracker.write(step({"a": 1.0}, 2.0))  # returns while the trackers wait
    gate.set()
    for tracker in both:
        tracker.close()
    assert [len(bad.written), len(good.written)] == [1, 3]
    assert good.closed
    (record,) = caplog.records
    assert "bad: the run goes on without it" in record.getMessage()
    assert "the network is gone" in record.getMessage()


def test_a_tracker_that_never_answers_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE_S", 0.05)
    gate = threading.Event()
    stuck = OwnThread("stuck", lambda: Recording(False, gate))
    stuck.write(step({"a": 1.0}, 2.0))
    stuck.close()
    assert "stuck: not all could be written" in caplog.text
    gate.set()


def test_names_of_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers_of("none") == ()
    assert trackers_of("tensorboard, tensorboard") == ("tensorboard",)
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("no_such_package", "x:Y"))
    with pytest.raises(ConfigError) as caught:
        trackers_of("comet,mlflow,tensorboard")
    first, second = caught.value.problems
    assert first == "--report-to comet: want some of tensorboard, wandb, mlflow, or none"
    assert second == "--report-to mlflow: it is not installed; pip install 'lobra[mlflow]'"


FULL = """
import logging, resource, sys
from pathlib import Path
from types import SimpleNamespace
from lobra.trainer import tensorboard, trackers
from lobra.trainer.trackers import open_tracker
logging.basicConfig(format="%(message)s")
trackers.curves = lambda item: {f"loss/{n}": 1.0 for n in range(1000)}
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
tracker = open_tracker("tensorboard", SimpleNamespace(output_dir=Path(sys.argv[1])), 0)
for step in range(30):
    tracker.write(SimpleNamespace(step=step))
tracker.close()
"""


@pytest.mark.long
def test_events_without_room_end_the_tracker_alone(run: Any) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", FULL, run.output_dir], env=environment, text=True,
        stderr=subprocess.PIPE, check=True,
    )  # fmt: skip
    assert "tensorboard: the run goes on without it, since it failed: OSError" in done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
