"""Start one process per rank on this machine and collect what each returns.

Importing torch, transformers and deepspeed costs about ten seconds of CPU time a process, so CPU
ranks are forked from one server that has imported them already. CUDA ranks are spawned, because
a CUDA context does not survive a fork. Each has a GPU of its own, unless the environment tells NCCL
that several may share one: then they take the machine's in turn, so that a plan of many ranks can
be checked (not timed) on a single GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from lobra.common.stop_signals import handled_by
from lobra.model.heartbeat import Heartbeats
from lobra.model.rank_process import HEARTBEATS, RankEnv, rank_main
from lobra.model.rank_results import RankError, Stalled, collect
from lobra.model.watch import Watch, stack_file

log = logging.getLogger(__name__)

SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own switch, from version 2.30 on
MEMORY_FOLDER = "/dev/shm"
DEFAULT_PRELOAD = ("torch", "transformers", "lobra.model.preload")


@dataclass(frozen=True)
class WatchOrder:
    """How ranks are watched.

    Attributes
    ----------
    end_after_s
        How long all may stand still in a step; None: what `model.watch` finds long.
    stacks
        The folder that gets every rank's stack when one stands still for longer.
    """

    end_after_s: float | None
    stacks: Path


class Interrupted(RuntimeError):
    """A stop signal ended the ranks before they could save anything; `.signal` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number


def default_threads(world_size: int) -> int:
    """Return the CPU threads a rank should use when `world_size` ranks share this machine.

    What the environment's OMP_NUM_THREADS says, else an equal share of the cores.
    """
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // world_size)


def local_rank(rank: int, device: str) -> int:
    """Return the CUDA device of a rank: its own, or one of those that ranks may share."""
    if device == "cuda" and os.environ.get(SHARED_GPUS) == "1":
        import torch

        return rank % max(1, torch.cuda.device_count())
    return rank


def _context(device: str, preload: Sequence[str]) -> multiprocessing.context.BaseContext:
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    return start_server(preload)


def start_server(preload: Sequence[str]) -> multiprocessing.context.BaseContext:
    """Have a process that has imported these modules fork CPU ranks; return where they start.

    A server that is there stays as it is: what it has not imported, every rank imports itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload, "lobra.model.frozen"])
    atexit.unregister(_end_server)
    atexit.register(_end_server)
    if threading.current_thread() is threading.main_thread():
        # The server inherits this: Ctrl-C must not interrupt its imports.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, previous)
    return context


def _end_server() -> None:
    """Kill the fork server when this process ends: by itself it would take ten seconds to end."""
    pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_ranks(
    target: str,
    world_size: int,
    kwargs: dict[str, Any] | None = None,
    *,
    device: str = "cpu",
    timeout_s: float | None = None,
    threads: int | None = None,
    environment: dict[str, str] | None = None,
    preload: Sequence[str] = DEFAULT_PRELOAD,
    on_signal: Callable[[int], None] | None = None,
    watch: WatchOrder | None = None,
) -> list[Any]:
    """Run `target(**kwargs)` in `world_size` processes and return their results in rank order.

    Parameters
    ----------
    target
        "package.module:function"; it finds torch.distributed initialised (gloo on CPU, NCCL on
        CUDA) and must return something picklable.
    world_size
        number of rank processes.
    kwargs
        keyword arguments, the same for every rank (picklable).
    device
        "cpu" or "cuda" (rank i uses CUDA device i, or `local_rank`'s).
    timeout_s
        seconds after which all ranks are ended and RankError is raised.
    threads
        CPU threads a rank; the machine's cores divided by the ranks when None.
    environment
        extra environment variables of the ranks.
    preload
        modules the fork server imports once, before the first rank is forked.
    on_signal
        makes stopping graceful: the first SIGINT or SIGTERM is passed to the ranks as SIGTERM
        (which `target` must handle by returning soon) and to this function; a second one ends
        everything at once.
    watch
        how ranks that note where they are (`model.heartbeat`) are watched; None: they are not.

    Raises
    ------
    Stalled
        A rank stood still for longer than `watch` allows; every other rank is ended.
    RankError
        A rank raised, died or timed out; every other rank is ended.
    Interrupted
        A rank ended on a stop signal without a result.
    ConfigError, MachineError
        A rank found a user's mistake, or something that the machine denies; passed on as it is.
    """
    context = _context(device, preload)
    processes: list[Any] = []
    pipes: list[Connection] = []
    with (
        _forwarded_signals(processes, on_signal) as received,
        tempfile.TemporaryDirectory(prefix="lobra-rendezvous-", dir=_memory_folder()) as name,
    ):
        folder = Path(name)
        heartbeats = Heartbeats.made(folder / HEARTBEATS, world_size)
        local = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
        if device == "cpu" and Path("/sys/class/net/lo").exists():
            local["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            for rank in range(world_size):
                env = RankEnv(
                    rank=rank,
                    local_rank=local_rank(rank, device),
                    world_size=world_size,
                    device=device,
                    folder=folder,
                    threads=threads or default_threads(world_size),
                    environment={**local, **(environment or {})},
                    graceful=on_signal is not None,
                )
                pipe, rank_pipe = context.Pipe()
                pipes.append(pipe)
                process = context.Process(  # type: ignore[attr-defined]
                    target=rank_main, args=(env, target, kwargs or {}, rank_pipe), daemon=False
                )
                process.start()
                processes.append(process)
                rank_pipe.close()
                with contextlib.suppress(BrokenPipeError):  # it died: seen when it is waited for
                    pipe.send("start")
                if received:  # a signal that came before this rank was there
                    process.terminate()
            watcher = None
            if watch is not None:
                pids = {rank: process.pid for rank, process in enumerate(processes)}
                stacks = {rank: stack_file(folder, rank) for rank in pids}
                watcher = Watch(heartbeats, pids, stacks, watch.end_after_s)
            return collect(processes, pipes, timeout_s, heartbeats, watcher)
        except RankError as error:
            if watch is not None and watcher is not None and isinstance(error, Stalled):
                error.add_note(watcher.keep_stacks(watch.stacks))
            if received:  # a rank was not yet able to stop gracefully
                raise Interrupted(received[0]) from error
            raise
        finally:
            _end(processes, at_once=len(received) > 1)
            for pipe in pipes:  # ends a rank that was started but is not among `processes`
                pipe.close()


@contextlib.contextmanager
def _forwarded_signals(
    processes: list[Any], on_signal: Callable[[int], None] | None
) -> Iterator[list[int]]:
    """Pass the first SIGINT or SIGTERM on to the ranks; raise KeyboardInterrupt on the second.

    Yields the list of signals received so far. `processes` may still grow. A signal that this
    process was started to ignore (SIGINT, under nohup or in a script's background) stays ignored.
    """
    received: list[int] = []
    if on_signal is None:
        yield received
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        on_signal(number)
        for process in processes:
            if process.is_alive():
                process.terminate()

    with handled_by(handle):
        yield received


def _memory_folder() -> str | None:
    """Return where files are in memory, None where there is no such place."""
    return MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK | os.X_OK) else None


def _end(processes: list[Any], at_once: bool = False) -> None:
    """End whatever still runs: first politely, after two seconds for good."""
    for process in processes:
        if process.is_alive():
            (process.kill if at_once else process.terminate)()
    deadline = time.monotonic() + 2.0
    for process in processes:
        with contextlib.suppress(AssertionError):
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            log.warning("rank process %s did not end, killing it", process.pid)
            process.kill()
            process.join()
