"""The watch over ranks that a launcher has started: they watch each other, host by host.

Of the ranks of a host the first that is not itself stopped looks, and ends its process if one holds
the run up; the launcher then ends the others.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import platform
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from lobra.model import heartbeat
from lobra.model.heartbeat import Heartbeats
from lobra.model.watch import DUMP_SIGNAL, LOOK_S, STOPPED, Watch, held_up, process_state
from lobra.trainer.host_watch import HostWatch

MEMORY_FOLDERS = (Path("/dev/shm"), Path(tempfile.gettempdir()))

log = logging.getLogger(__name__)

_kept_open: list[object] = []  # files that are written to whatever happens


def watch_each_other(
    group: dist.ProcessGroup,
    end_after_s: float | None,
    stacks_folder: Path,
    hosts: HostWatch,
    remedy: Callable[[], str] | None,
) -> None:
    """Begin to note where this rank is, and to watch the ranks of this host. Collective.

    Parameters
    ----------
    group
        Of all ranks, on CPUs.
    end_after_s, stacks_folder
        As `model.launch.WatchOrder` has them.
    hosts
        Knows which is lost, where a rank of another holds the run up.
    remedy
        As `trainer.host_watch.HostWatch` has it.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0, group=group)
    memory = next(folder for folder in MEMORY_FOLDERS if os.access(folder, os.W_OK))
    path = memory / f"lobra-{token[0]}"
    heartbeats = Heartbeats.shared(path, world)
    stack = tempfile.TemporaryFile()  # noqa: SIM115  (open, and without a name, to the end)
    faulthandler.register(DUMP_SIGNAL, file=stack)
    _kept_open.append(stack)
    known: list[tuple[str, int, int]] = [("", 0, 0)] * world
    dist.all_gather_object(known, (platform.node(), os.getpid(), stack.fileno()), group=group)
    path.unlink(missing_ok=True)  # all of this host have mapped it
    here = {one: own for one, own in enumerate(known) if own[0] == platform.node()}
    pids = {one: pid for one, (_, pid, _) in here.items()}
    stacks = {one: Path(f"/proc/{pid}/fd/{number}") for one, (_, pid, number) in here.items()}
    heartbeat.attach(heartbeats, rank)
    heartbeat.beat("loading")
    watch = Watch(heartbeats, pids, stacks, end_after_s, has_other_hosts=len(here) < world)
    arguments = (watch, rank, pids, stacks_folder, hosts.quiet, remedy)
    threading.Thread(target=_look_on, args=arguments, name="watch", daemon=True).start()


def _look_on(
    watch: Watch,
    own: int,
    pids: dict[int, int],
    stacks_folder: Path,
    quiet_host: Callable[[], str | None],
    remedy: Callable[[], str] | None,
) -> None:
    while True:
        time.sleep(LOOK_S)
        if own != min(rank for rank, pid in pids.items() if process_state(pid) not in STOPPED):
            continue
        if stall := watch.look():
            kept = watch.keep_stacks(stacks_folder)
            lost = quiet_host() if stall[0] is None else None
            told = [lost or held_up(*stall), kept]
            if remedy is not None and 0 in pids:  # the host that has the checkpoints
                told.append(remedy())
            log.critical("%s", "\n".join(told))
            os._exit(1)
