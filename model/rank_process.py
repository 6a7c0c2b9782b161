"""The process of one rank: it joins its world, runs its target and sends back what that returns."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError, MachineError
from lobra.model import heartbeat
from lobra.model.heartbeat import Heartbeats
from lobra.model.host_memory import keep_freed_memory
from lobra.model.watch import DUMP_SIGNAL, stack_file

HEARTBEATS = "heartbeats"  # in the folder where ranks meet

# Stop signals that reached this rank before its target installed a handler of its own.
early_stop: list[int] = []


@dataclass(frozen=True)
class RankEnv:
    """What a rank process needs to join its world.

    `local_rank` is its CUDA device. In `folder` ranks meet, note where they are and leave stacks.
    """

    rank: int
    local_rank: int
    world_size: int
    device: str
    folder: Path
    threads: int
    environment: dict[str, str]
    graceful: bool = False


def init_rank(env: RankEnv) -> None:
    """Join torch.distributed as rank `env.rank` and set the device and the thread count."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(env.threads)
    if env.device == "cuda":
        torch.cuda.set_device(env.local_rank)
    else:
        keep_freed_memory()
    dist.init_process_group(
        backend="nccl" if env.device == "cuda" else "gloo",
        init_method=f"file://{env.folder}/store",
        rank=env.rank,
        world_size=env.world_size,
    )


def resolve_target(target: str) -> Callable[..., Any]:
    """Return the function named "package.module:function"."""
    module, _, function = target.partition(":")
    resolved: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return resolved


def rank_main(env: RankEnv, target: str, kwargs: dict[str, Any], pipe: Connection) -> None:
    """Run `target` on one rank and send ("ok", result) or ("error", traceback) back.

    Does nothing before the parent's word: a parent that was interrupted while it started this
    process does not know it, so nobody would end it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    if env.graceful:
        signal.signal(signal.SIGTERM, lambda number, _frame: early_stop.append(number))
    threading.Thread(target=_end_with_parent, args=(env.folder,), daemon=True).start()
    try:
        pipe.recv()
    except (EOFError, ConnectionResetError):
        os._exit(1)
    os.environ.update(env.environment)
    os.environ.update(
        RANK=str(env.rank), LOCAL_RANK=str(env.local_rank), WORLD_SIZE=str(env.world_size)
    )
    try:
        import torch.distributed as dist

        heartbeat.attach(Heartbeats(env.folder / HEARTBEATS, env.world_size), env.rank)
        heartbeat.beat("joining the others")
        stacks = stack_file(env.folder, env.rank).open("w", encoding="utf-8")
        faulthandler.register(DUMP_SIGNAL, file=stacks)
        init_rank(env)
        heartbeat.beat("loading")
        result = resolve_target(target)(**kwargs)
        pipe.send(("ok", result))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:  # reported to the parent, which raises it
        told = isinstance(error, ConfigError | MachineError)  # says all that is to be known
        pipe.send(("error", error if told else traceback.format_exc()))
        # Leave at once: peers blocked in a collective with us must not keep us alive.
        os._exit(1)


def _end_with_parent(folder: Path) -> None:
    """End this process as soon as the one that started it is gone, killed ones included.

    Such a one has left the folder behind.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
