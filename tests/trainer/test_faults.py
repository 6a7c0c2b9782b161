"""The matrix of faults: after any of them a run goes on by itself and ends with the same bits."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

from lobra.common.storage import StorageError
from lobra.model.rank_results import RankError
from lobra.trainer import restarts
from lobra.trainer.arguments import on_plan, with_resume
from lobra.trainer.metrics import read_metrics
from lobra.trainer.rank import RankResult
from lobra.trainer.restarts import run_with_restarts
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_llama
from tests.tiers import ALL
from tests.trainer.command import train, write_config
from tests.trainer.faults import FAULT_FILE
from tests.trainer.support import make_plan, make_run, random_dataset
from tests.trainer.test_resume import TASKS

pytestmark = pytest.mark.ranks
STEPS = 6
HANG_TIMEOUT_S = 5.0  # a crowded machine may let a rank wait for seconds
CASES = {  # the kind of fault, where it strikes, and what is said of it
    "killed": (1, "rank 1 failed: the process was killed by SIGKILL"),
    "segmentation fault": (0, "rank 0 failed: the process was killed by SIGSEGV"),
    "left": (1, "with exit code 3"),
    "raises": (1, "ValueError: odd"),
    "stopped": (1, "is stopped by a signal (T); waiting for it: rank 0, "),
    "hangs": (1, "rank 1 failed: it has not moved for 5 s, preparing in step"),
    "damages and dies": (1, "is damaged (its SHA-256 is not that of what was written)"),
    "dies while saving": (0, "rank 0 failed: the process was killed by SIGKILL (writing in step"),
    "no room": (0, "cannot be written (File too large): need "),
}
IN_DEFAULT_TIER = ("killed", "stopped", "damages and dies")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("faults")
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(3)]
    tasks = (replace(TASKS[0], lora_dropout=0.2), *TASKS[1:])
    run = make_run(
        folder / "straight", save_llama(folder / "base"), tasks, data,
        make_plan([(1, 1), (1, 1)], 64), STEPS, save_every=2, num_steps=(6, 6, 3),
        hang_timeout_s=HANG_TIMEOUT_S, deterministic=True,
    )  # fmt: skip
    shutil.copytree(run.output_dir, folder / "fresh")
    run_local(run)
    return run


def copied(straight: RunSpec, folder: Path) -> RunSpec:
    """Return the same run in another folder, in which nothing was trained yet."""
    shutil.copytree(straight.output_dir.parent / "fresh", folder)
    return replace(straight, output_dir=folder)


def kept(run: RunSpec) -> dict[str, bytes | list]:
    """Return all adapters and checkpoints, to the last bit, and what was measured of the tasks."""
    found: dict[str, bytes | list] = {
        str(path.relative_to(run.output_dir)): path.read_bytes()
        for path in run.output_dir.rglob("*.safetensors")
    }
    found["metrics"] = [(line["step"], line["tasks"]) for line in read_metrics(run.output_dir)]
    return found


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in IN_DEFAULT_TIER else pytest.mark.long)
        for kind in CASES
    ],
)
def test_a_run_goes_on_by_itself(
    kind: str, straight: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    run = copied(straight, tmp_path / "run")
    rank, said = CASES[kind]
    draw = random.Random(None if settings.get_current_profile_name() == ALL else kind)
    step = draw.randrange(2, STEPS)  # any; the first checkpoint is that of the second step
    fault = {"kind": kind, "rank": rank, "step": step}
    (run.output_dir / FAULT_FILE).write_text(json.dumps(fault))
    start = partial(run_local, target="tests.trainer.faults:train_with_fault")
    with caplog.at_level(logging.WARNING):
        run_with_restarts(run, 1, start)
    assert said in caplog.text, fault
    assert "restart 1 of 1" in caplog.text
    assert kept(run) == kept(straight), fault
    if kind in ("stopped", "hangs"):
        stacks = sorted((run.output_dir / "stacks").iterdir())
        assert "most recent call first" in stacks[0].read_text()
        assert len(stacks) == (1 if kind == "stopped" else 2), "a stopped process writes none"


def test_the_same_run_has_the_same_bits(straight: RunSpec, tmp_path: Path) -> None:
    run = copied(straight, tmp_path / "run")
    run_local(run)
    assert kept(run) == kept(straight)


def test_the_command_starts_a_run_again_and_notes_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.0)
    ends = iter([2, 3])

    def die_twice(run: RunSpec) -> list[RankResult]:
        if (end := next(ends, None)) is None:
            return run_local(run)
        run_local(replace(run, last_step=end))
        raise RankError(0, "odd")

    monkeypatch.setattr("lobra.trainer.run.run_local", die_twice)
    write_config(steps=4)
    assert train(place, "--max-restarts", "2") == 0
    assert [line["step"] for line in read_metrics(Path("run"))] == [0, 1, 2, 3]
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert (config["resumed_at"], config["resumes"]) == (3, [2, 3])


def test_a_run_that_fails_again_says_how_to_go_on(tmp_path: Path) -> None:
    run = type("Run", (), {"output_dir": tmp_path, "resume_step": None, "revive": ()})()
    with pytest.raises(RankError) as caught:
        run_with_restarts(run, 0, fail)
    assert "no checkpoint was saved" in caught.value.__notes__[0]
    assert "begin anew, with the same command" in caught.value.__notes__[0]
    (tmp_path / "adapters").mkdir()
    with pytest.raises(RankError) as caught:
        run_with_restarts(run, 0, fail)
    assert "begin anew, in another --output-dir" in caught.value.__notes__[0]
    (tmp_path / "checkpoints/step_12").mkdir(parents=True)
    (tmp_path / "checkpoints/step_12/state.json").touch()
    with pytest.raises(RankError) as caught:
        run_with_restarts(run, 0, fail)
    for part in ("checkpoints/step_12, after 12 steps", "--resume", "--max-restarts"):
        assert part in caught.value.__notes__[0]


def fail(_run: object) -> list:
    raise RankError(1, "odd")


def test_pauses_grow_while_a_run_comes_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    steps = iter([None, None, 4, 4, 4, 8])
    monkeypatch.setattr(restarts.time, "sleep", pauses.append)
    monkeypatch.setattr(restarts, "newest_whole", lambda _folder: (next(steps), []))
    ours = restarts.Restarts(tmp_path, 6)
    assert [ours.next("odd") for _ in range(6)] == [None, None, 4, 4, 4, 8]
    assert pauses == [2, 4, 1, 2, 4, 1]
    assert not ours.are_left


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_between_two_starts_a_signal_ends_the_run_at_once(
    number: signal.Signals, code: int, place: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("lobra.trainer.run.run_local", fail)
    monkeypatch.setattr(restarts.time, "sleep", lambda _s: os.kill(os.getpid(), number))
    write_config(steps=4)
    assert train(place, "--max-restarts", "2") == code
    assert f"lobra: interrupted by {number.name}: no checkpoint" in capsys.readouterr().err


def test_a_launcher_is_started_again_with_the_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts.time, "sleep", lambda _s: None)
    monkeypatch.setattr(restarts, "newest_whole", lambda _folder: (4, []))
    started: list[list[str]] = []
    codes = iter([1, 137, 0])

    def launch(command: list[str]) -> int:
        started.append(command)
        return next(codes)

    given = ["--model", "tiny", "--resume", "2", "--seed", "3"]

    def command(step: int | None, plan: Path | None) -> list[str]:
        return with_resume(on_plan(given, plan), step)

    assert restarts.launch_with_restarts(command, launch, tmp_path, 5) == 0
    again = ["--model", "tiny", "--seed", "3", "--resume", "4"]
    assert started == [given, again, again]
    codes = iter([0, 1, 0])
    (tmp_path / "checkpoints/step_6").mkdir(parents=True)
    (tmp_path / "checkpoints/step_6/state.json").touch()
    started.clear()

    def replan(command: list[str]) -> int:
        if not started:  # the ranks end for another plan
            (tmp_path / "plans").mkdir()
            (tmp_path / "plans/step_6.yaml").touch()
        return launch(command)

    def plan_again(step: int | None, plan: Path | None) -> Path | None:
        assert (step, plan) == (4, tmp_path / "plans/step_6.yaml")
        return Path("smaller.yaml")

    assert restarts.launch_with_restarts(command, replan, tmp_path, 1, plan_again) == 0
    assert [one[5:] for one in started[1:]] == [
        [str(tmp_path / "plans/step_6.yaml"), "--resume", "6"],
        ["smaller.yaml", "--resume", "4"],
    ]
    codes = iter([1, 2])
    assert restarts.launch_with_restarts(command, launch, tmp_path, 5) == 2
    codes = iter([1])
    assert restarts.launch_with_restarts(command, launch, tmp_path, 0) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--resume"], []),
        (["--resume=3", "--seed", "1"], ["--seed", "1"]),
        (["--resume", "--seed", "1"], ["--seed", "1"]),
        (["--revive", "a", "--resume", "12"], ["--revive", "a"]),
    ],
)
def test_the_arguments_of_a_restart(given: list[str], expected: list[str]) -> None:
    assert with_resume(given, 7) == [*expected, "--resume", "7"]
    assert with_resume(given, None) == given


def test_a_failure_of_a_file_system_survives_the_way_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(StorageError("runs/a: cannot be written")))
    assert isinstance(error, StorageError) and str(error) == "runs/a: cannot be written"
