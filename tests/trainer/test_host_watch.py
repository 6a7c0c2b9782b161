"""A host of which nothing is heard explains a connection that broke; one that notes does not."""

from __future__ import annotations

import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lobra.model.launch import run_ranks
from lobra.trainer import host_watch, launched_watch
from lobra.trainer.host_watch import HostWatch, _spans

HERE = "tests.trainer.test_host_watch"
BROKEN = RuntimeError("[pair.cc:544] Connection closed by peer [10.77.0.2]:38821")


def explained_on_rank(port: int) -> tuple[str | None, ...]:
    """Return what a rank on a host of its own makes of failures, before and after rank 1 ends."""
    rank = dist.get_rank()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    store = dist.TCPStore("127.0.0.1", port, is_master=True) if rank == 0 else None
    platform.node = lambda: f"host{rank}"
    host_watch.BREAK_S = 3.0
    group = dist.new_group(backend="gloo")
    assert group is not None
    watch = HostWatch(group, None, None)
    time.sleep(2.0)  # all have noted
    found = [watch.reason(ValueError("odd")), watch.reason(BROKEN) if rank == 0 else None]
    dist.barrier(group=group)
    if rank == 1:
        watch.end()
    else:
        found.append(watch.reason(BROKEN))
    dist.barrier(group=group)
    del store
    return tuple(None if one is None else str(one) for one in found)


@pytest.mark.long
@pytest.mark.ranks
def test_a_lost_host_is_the_reason() -> None:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port = tried.getsockname()[1]
    (another, none_is_lost, lost), _ = run_ranks(f"{HERE}:explained_on_rank", 2, {"port": port})
    assert another is None and none_is_lost is None
    assert lost.startswith("host host1 with rank 1 is lost: nothing is heard of it on host0 for ")


def test_ranks_in_a_row_are_told_by_their_ends() -> None:
    assert [_spans(own) for own in ([3], [3, 4, 5], [1, 3])] == ["3", "3 to 5", "1, 3"]


class Stall:
    """A watch that sees a rank hold the run up; None: one of another host."""

    def __init__(self, rank: int | None) -> None:
        self.rank = rank

    def look(self) -> tuple[int | None, str]:
        return self.rank, "it sleeps"

    def keep_stacks(self, _target: Path) -> str:
        return "stacks are kept"


@pytest.mark.parametrize(
    ("rank", "quiet", "told"),
    [
        (1, "host b is lost", "rank 1 holds the run up: it sleeps"),
        (None, None, "a rank of another host holds the run up: it sleeps"),
        (None, "host b is lost", "host b is lost"),
    ],
)
@pytest.mark.parametrize("remedy", [None, lambda: "start it again"])
def test_a_stall_is_told_with_how_one_goes_on(
    rank: int | None,
    quiet: str | None,
    told: str,
    remedy: Callable[[], str] | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a run or a service, as who started it says; not where that one goes on by itself.

    A host that is lost while it writes is given long to be heard of again: then others stall.
    """
    watch: Any = Stall(rank)
    monkeypatch.setattr(launched_watch, "LOOK_S", 0.0)
    monkeypatch.setattr(os, "_exit", sys.exit)
    pids = dict.fromkeys(range(2), os.getpid())
    with pytest.raises(SystemExit):
        launched_watch._look_on(watch, 0, pids, Path("stacks"), lambda: quiet, remedy)
    expected = [told, "stacks are kept", *([remedy()] if remedy else [])]
    assert caplog.messages[-1].splitlines() == expected
