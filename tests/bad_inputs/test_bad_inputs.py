"""Every bad input: one message that names file, place and remedy, exit code 2, nothing written."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lobra.cli import main
from lobra.common.errors import MOST_CHARACTERS, MOST_LINES
from lobra.model.rank_results import RankError
from tests.assets.golden import HERE as GOLDEN
from tests.bad_inputs import data, models, options, plans, profiles, runs, task_files
from tests.bad_inputs.case import COMMANDS, FORMATS

TABLES = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (task_files, plans, profiles, data, models, runs, options)
}
ALL = {f"{table}/{name}": case for table, cases in TABLES.items() for name, case in cases.items()}
MOST_SECONDS = 20  # of processor time of a refusal; most take 0.05
MOST_WAITING_S = 120  # for a pipe that nobody writes to: no processor time
MOST_BYTES = 512 << 20  # that a refusal adds to the process


@pytest.fixture(scope="module")
def set_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, profiles, a plan, and a run with a checkpoint, all good."""
    folder = tmp_path_factory.mktemp("good")
    for name in ("base", "data", "start"):
        shutil.copytree(GOLDEN / name, folder / name)
    for name in ("run", "exp_result"):
        shutil.copytree(FORMATS / name, folder / name)
    for name in ("plan.yaml", "tasks.json"):
        shutil.copy(FORMATS / name, folder)
    for path in folder.glob("exp_result/profile/cost_model/*.csv"):
        path.unlink()
    # Few rows, because every case fits them.
    times = "".join(f"1,{tokens},1,{1 + tokens / 50}\n" for tokens in (32, 64, 128, 256))
    (folder / profiles.TIME).write_text("tp,seq_len,mbs,time\n" + times)
    (folder / "lengths.json").write_text('{"everything": [60, 30, 10], "few": [20, 8]}')
    return folder


@pytest.fixture
def place(set_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a copy of the good set-up; no run is started, no command takes more than its time."""
    shutil.copytree(set_up, tmp_path / "place", copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    for name in ("DP_BUCKET", "EXPR_DATA_DISPATCH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("lobra.trainer.run.run_local", started)
    monkeypatch.setattr("lobra.commands.train.run_launcher", started)
    monkeypatch.setattr("lobra.trainer.run.os.execve", started)

    def too_slow(number: int, frame: FrameType | None) -> None:
        pytest.fail("not refused in time")

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, MOST_SECONDS),
        signal.ITIMER_REAL: (signal.SIGALRM, MOST_WAITING_S),
    }
    previous = {number: signal.signal(number, too_slow) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    yield
    for timer in timers:
        signal.setitimer(timer, 0)
    for number, handler in previous.items():
        signal.signal(number, handler)


def started(*_: object) -> None:
    raise AssertionError("was not refused")


def content() -> dict[str, tuple[int, int]]:
    """Return size and time of change of everything below the working folder."""
    found = {}
    for folder, _, names in os.walk("."):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (status.st_size, status.st_mtime_ns)
    return found


def tiered() -> list[Any]:
    """Return the cases' names; those that another of their kind stands for are long."""
    late = re.compile(r"-([1-9]|\d\d)$|/yaml-many$|/yaml-long$|/meta-|/memory-sidecar-|/index-l")
    return [pytest.param(n, marks=pytest.mark.long if late.search(n) else ()) for n in ALL]


@pytest.mark.parametrize("name", tiered())
def test_is_refused(name: str, place: None, capsys: pytest.CaptureFixture[str]) -> None:
    case = ALL[name]
    case.write()
    before, peak = content(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = main(case.words)
    message = capsys.readouterr().err
    assert code == 2, message
    for part in case.says:
        assert part in message
    assert "Traceback" not in message
    told = message[message.index("lobra: ") :]
    assert told.count("lobra: ") == 1 and len(told.splitlines()) <= MOST_LINES + 1
    assert all(len(line) < MOST_CHARACTERS + 100 for line in told.splitlines())
    assert content() == before
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 < MOST_BYTES


@pytest.mark.parametrize("command", ["train", "resume", "plan", "simulate", "report"])
def test_the_set_up_itself_is_good(
    command: str, place: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_run: object) -> None:
        raise RankError(0, "this rank was started")

    monkeypatch.setattr("lobra.trainer.run.run_local", start)
    assert main(COMMANDS[command]) == (1 if command in ("train", "resume") else 0)


def test_there_are_enough() -> None:
    default = [param for param in tiered() if not param.marks]
    assert len(ALL) > len(default) >= 250
