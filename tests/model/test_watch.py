"""Which rank holds a run up, and when that is said: told from heartbeats, processes and stacks."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lobra.model import watch
from lobra.model.heartbeat import PHASES, Beat, Heartbeats
from lobra.model.watch import LOOK_S, SLOW_S, Watch, process_state, stack_file

SLEEPER = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, file=open(sys.argv[1], "w"))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def heartbeats(tmp_path: Path) -> Heartbeats:
    return Heartbeats.made(tmp_path / "heartbeats", 3)


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[list[int]]:
    """Three processes that write their stacks when asked to."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SLEEPER, stack_file(tmp_path, rank)], stdout=subprocess.PIPE
        )
        for rank in range(3)
    ]
    for one in started:
        assert one.stdout is not None and one.stdout.readline()
    yield [one.pid for one in started]
    for one in started:
        one.kill()
        one.communicate()


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(watch.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(watch.time, "sleep", lambda _s: None)

    def silence(self, one: Watch, seconds: float) -> tuple[int, str] | None:
        """Look every second, as long as the watch finds nothing; return what it does."""
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_S
            if found := one.look():
                return found
        return None


def watch_of(
    heartbeats: Heartbeats, pids: list[int], end_after_s: float | None, folder: Path
) -> Watch:
    stacks = {rank: stack_file(folder, rank) for rank in range(len(pids))}
    return Watch(heartbeats, dict(enumerate(pids)), stacks, end_after_s)


def note(heartbeats: Heartbeats, *phases: str, step: int = 7, expected_s: float = 0.5) -> None:
    for rank, phase in enumerate(phases):
        count = heartbeats.read()[rank].count + 1
        heartbeats.note(rank, Beat(count, step, phase, expected_s))


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + 30
    while process_state(pid) != "T":
        assert time.monotonic() < until


def test_what_is_noted_is_read(heartbeats: Heartbeats, tmp_path: Path) -> None:
    assert heartbeats.read() == [Beat(0, 0, PHASES[0])] * 3
    Heartbeats(tmp_path / "heartbeats", 3).note(1, Beat(9, 4, "reducing", 2.5))
    assert heartbeats.read()[1] == Beat(9, 4, "reducing", 2.5)
    assert [str(beat) for beat in heartbeats.read()[:2]] == [PHASES[0], "reducing in step 4"]


def test_the_stopped_process_is_to_blame_though_another_is_less_far(
    heartbeats: Heartbeats, sleepers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    stop(sleepers[2])
    clock = Clock(monkeypatch)
    one = watch_of(heartbeats, sleepers, 60, tmp_path)
    note(heartbeats, "computing", "computing", "reducing")
    assert clock.silence(one, 29) is None
    assert not caplog.records
    assert clock.silence(one, 20) is None
    (warning,) = [record.getMessage() for record in caplog.records]
    start = (
        "rank 2 holds the run up: it has not moved for 30 s, reducing in step 7 (a step takes up "
    )
    assert warning.startswith(f"{start}to 0.5 s); its process {sleepers[2]} is stopped by a signal")
    assert "stopped by a signal (T); waiting for it: ranks 0, 1, computing in step 7" in warning
    rank, why = clock.silence(one, 60) or (None, "")
    assert rank == 2 and clock.now == 60
    assert f"its process {sleepers[2]} is stopped by a signal (T)" in why


def test_a_stopped_process_is_missed_though_others_move(
    heartbeats: Heartbeats, sleepers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a service at rest, whose ranks are told now and then that there is nothing to do."""
    stop(sleepers[1])
    clock = Clock(monkeypatch)
    one = watch_of(heartbeats, sleepers, 60, tmp_path)
    for _ in range(5):
        note(heartbeats, "waiting for its order")
        assert clock.silence(one, 10) is None
    rank, why = clock.silence(one, 10) or (None, "")
    assert (rank, clock.now) == (1, 60) and "is stopped by a signal (T)" in why


@pytest.mark.parametrize("culprit", [None, 1])
def test_all_sleep_but_one_is_in_no_collective(
    culprit: int | None, heartbeats: Heartbeats, sleepers: list[int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock = Clock(monkeypatch)
    one = watch_of(heartbeats, sleepers, 60, tmp_path)
    note(heartbeats, "updating", "updating", "reducing")
    monkeypatch.setattr(Watch, "_dump", lambda self: None)
    for rank in range(3):
        where = "model/stage.py" if rank == culprit else "torch/distributed/distributed_c10d.py"
        text = 'Thread 0x1 (most recent call first):\n  File "threading.py", line 3\n\n'
        text += f'Current thread 0x2 (most recent call first):\n  File "{where}", line 5 in x\n'
        stack_file(tmp_path, rank).write_text(text)
    rank, _ = clock.silence(one, 100) or (None, "")
    assert rank == (2 if culprit is None else culprit), "else the one that is least far"


def test_where_all_are_alike_it_is_one_of_another_host(
    heartbeats: Heartbeats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Watch, "_dump", lambda self: None)
    pids = dict.fromkeys(range(3), os.getpid())
    for phases, expected in ((["reducing"] * 3, None), (["reducing", "computing", "reducing"], 1)):
        stacks = {rank: stack_file(tmp_path, rank) for rank in pids}
        one = Watch(heartbeats, pids, stacks, 60, has_other_hosts=True)
        note(heartbeats, *phases)
        rank, _ = clock.silence(one, 100) or (-1, "")
        assert rank == expected
    assert caplog.messages[0].startswith(
        "a rank of another host holds the run up: nothing has moved here for 30 s (a step takes "
    )


def test_a_stack_of_every_rank_is_written(
    heartbeats: Heartbeats, sleepers: list[int], tmp_path: Path
) -> None:
    watch_of(heartbeats, sleepers, 60, tmp_path)._dump()
    for rank in range(3):
        assert "most recent call first" in stack_file(tmp_path, rank).read_text()


def test_how_long_is_too_long(
    heartbeats: Heartbeats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.ERROR)
    clock = Clock(monkeypatch)
    monkeypatch.setattr(Watch, "_dump", lambda self: None)
    pids = [os.getpid()] * 3

    def lasts(end_after_s: float | None, *phases: str, expected_s: float = 0.5) -> float:
        one = watch_of(heartbeats, pids, end_after_s, tmp_path)
        note(heartbeats, *phases, expected_s=expected_s)
        start = clock.now
        assert clock.silence(one, 1e5)
        return clock.now - start - LOOK_S

    assert lasts(None, *["computing"] * 3) == 600
    assert lasts(None, *["computing"] * 3, expected_s=100) == 2000, "long steps"
    assert lasts(20, *["computing"] * 3) == 20
    assert lasts(20, *["computing"] * 3, expected_s=0) == 600, "the first step compiles"
    assert lasts(20, "loading", "loading", "computing") == SLOW_S
    one = watch_of(heartbeats, pids, 20, tmp_path)
    for _ in range(30):  # somebody moves now and then
        note(heartbeats, "computing")
        assert clock.silence(one, 19) is None
    clock.now += 1e6  # this process itself was stopped
    assert one.look() is None
