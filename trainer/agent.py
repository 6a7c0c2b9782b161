"""torchrun's agent: it starts a launch's ranks again after a failure, with the same arguments.

A run notes which agent has launched it. Of the ranks that the same one starts, rank 0 finds its own
run in the folder and goes on with it; what any other launch finds there is another run.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.trainer.request import TrainRequest
from lobra.trainer.restarts import forget_steps, newest_step
from lobra.trainer.run_config import read_run_config

log = logging.getLogger(__name__)


def agent_of(environment: Mapping[str, str], parent: int) -> str | None:
    """Return what no two of torchrun's agents have in common; None if torchrun started no rank.

    Parameters
    ----------
    environment
        A rank's.
    parent
        The process that has started it.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    fields = Path(f"/proc/{parent}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return f"process {parent} of {platform.node()}, started at tick {fields[19]}"


def join_world(backend: str, environment: Mapping[str, str]) -> None:
    """Initialise torch.distributed as a launcher's variables say. Collective.

    An agent keeps what its ranks have told each other, and tells it those that it starts again:
    addresses at which nobody is any more. So each start on one host has keys of its own; on several
    hosts the agents do not agree which start it is, so the user is told what helps.
    """
    import torch.distributed as dist
    from torch.distributed.constants import default_pg_timeout

    # No device in either way of it: see `model.groups.new_group`.
    keeps = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if keeps and environment["GROUP_WORLD_SIZE"] == "1":
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        kept = dist.TCPStore(address, port, world, is_master=False, timeout=default_pg_timeout)
        store = dist.PrefixStore(f"start {environment['TORCHELASTIC_RESTART_COUNT']}", kept)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        return
    if keeps and environment["RANK"] == "0" and environment["TORCHELASTIC_MAX_RESTARTS"] != "0":
        log.warning(
            "torchrun's --max-restarts on several hosts needs --rdzv-backend c10d and, on all of "
            "them, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: else ranks that are started again look "
            "for each other where they were before"
        )
    dist.init_process_group(backend)


def going_on(request: TrainRequest) -> TrainRequest:
    """Return a request as it is meant if its agent has launched the run in its folder before.

    The run goes on from its newest whole checkpoint or, without one, begins anew.
    """
    folder = request.output_dir
    try:
        known = read_run_config(folder)
    except ConfigError:
        return request
    if request.agent is None or known.agent != request.agent:
        return request
    step = newest_step(folder)
    where = "its start" if step is None else f"step {step}"
    log.warning("torchrun has started the ranks again: the run goes on from %s", where)
    if step is None:
        if not request.is_resumed:
            forget_steps(folder)
        return request
    revive = request.revive if step == known.resumed_at else ()  # later ones have them alive
    return replace(request, resume=(step,), revive=revive)
