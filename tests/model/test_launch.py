"""Starting ranks: whatever interrupts it, no process outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest

from lobra.model.launch import SHARED_GPUS, _forwarded_signals, local_rank, run_ranks
from lobra.model.rank_results import RankError
from tests.model.support import is_alive

END_S = 60.0  # far less than the five minutes torch waits for a lost rendezvous


def after_start(
    monkeypatch: pytest.MonkeyPatch, starts: int, act: Callable[[int], None]
) -> list[int]:
    """Call `act` with the pid of the rank forked as number `starts`; return the pids, growing."""
    pids: list[int] = []
    read_signed = forkserver.read_signed

    def read(pipe: int) -> int:
        number = read_signed(pipe)
        if len(pids) < starts:  # later numbers are exit codes
            pids.append(number)
            if len(pids) == starts:
                act(number)
        return number

    monkeypatch.setattr(forkserver, "read_signed", read)
    return pids


@pytest.mark.ranks
@pytest.mark.parametrize("starts", [1, 2])
def test_a_rank_whose_start_was_interrupted_ends(
    starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the fork server is busy: the rank is forked all the same, later."""

    def interrupt(_pid: int) -> None:
        raise KeyboardInterrupt

    pids = after_start(monkeypatch, starts, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_ranks("os:getpid", 2)
    assert len(pids) == starts
    deadline = time.monotonic() + END_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"of the ranks {pids} some live on"
        time.sleep(0.05)


@pytest.mark.ranks
def test_a_rank_that_dies_before_it_starts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    after_start(monkeypatch, 1, lambda pid: os.kill(pid, signal.SIGKILL))
    with pytest.raises(RankError, match="rank 0 failed: the process was killed by SIGKILL"):
        run_ranks("os:getpid", 1)


KILLED_LAUNCHER = """
import multiprocessing, pathlib, sys, time
from lobra.model.rank_process import _end_with_parent
context = multiprocessing.get_context("fork")
context.Process(target=_end_with_parent, args=(pathlib.Path(sys.argv[1]),)).start()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_launcher_leaves_no_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rendezvous"
    folder.mkdir()
    launcher = subprocess.Popen(
        [sys.executable, "-c", KILLED_LAUNCHER, str(folder)], stdout=subprocess.PIPE
    )
    assert launcher.stdout is not None and launcher.stdout.readline()
    launcher.kill()
    launcher.communicate()
    deadline = time.monotonic() + END_S
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupt_that_was_ignored_from_the_start_stays_ignored() -> None:
    """As under nohup and in a script's background; SIGTERM is then what stops a run."""
    told: list[int] = []
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with _forwarded_signals([], told.append) as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert not received
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == told == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_ranks_have_a_gpu_each_unless_nccl_is_told_that_they_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv(SHARED_GPUS, raising=False)
    assert [local_rank(rank, "cuda") for rank in range(5)] == [0, 1, 2, 3, 4]
    monkeypatch.setenv(SHARED_GPUS, "1")
    assert [local_rank(rank, "cuda") for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [local_rank(rank, "cpu") for rank in range(3)] == [0, 1, 2]
