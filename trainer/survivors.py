"""The GPUs that are left of a run which has lost some: on which plan it goes on on them."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import gcd
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.layout.placement import place
from lobra.layout.plan import Plan, save_plan
from lobra.trainer.checkpoint import read_state
from lobra.trainer.live_tasks import at_checkpoint, starting_tasks, tasks_at
from lobra.trainer.prepare import prepare
from lobra.trainer.proposal import PlanningProcess, Proposal, propose
from lobra.trainer.replanner import note_move, planning_job
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_spec import PLAN_FOLDER, RunSpec

log = logging.getLogger(__name__)


def gpus_left(run: RunSpec) -> int:
    """Return how many GPUs of this machine answer; on a CPU all ranks that a plan asks for do."""
    if run.device == "cpu":
        return run.plan.num_gpus
    code = "import torch; print(torch.cuda.device_count())"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    return int(found.stdout) if found.stdout.strip().isdecimal() else 0


def survivors_plan(run: RunSpec, step: int | None, nodes: Sequence[int]) -> Proposal:
    """Return the best plan for the GPUs that are left, beside the one that a run has.

    It holds the longest sequence of every task that has steps left, beside all tasks' adapters; no
    tensor-parallel group lies on several hosts.

    Parameters
    ----------
    run
        A run that may be planned anew.
    step
        The checkpoint that it goes on from; None: it begins anew.
    nodes
        How many GPUs each host has.

    Raises
    ------
    ConfigError
        There is none; it says what the largest layout holds, and what would hold more.
    """
    if step is None:
        tasks = starting_tasks(run)
    else:
        state = read_state(run.output_dir, step, whole=False)
        tasks, run = tasks_at(run, state), at_checkpoint(run, state)
    if not sum(nodes):
        raise ConfigError("no GPU is left")
    job = planning_job(run.on_gpus(sum(nodes), gcd(*nodes)), tasks, step or 0)
    found = propose(replace(job, most_tp=max(nodes)))
    ranks = place(found.plan, nodes).as_lists()
    return replace(found, plan=replace(found.plan, meta={**found.plan.meta, "ranks": ranks}))


def plan_on_hosts(
    request: TrainRequest,
    present: Plan,
    ranks: Mapping[str, int],
    left: Mapping[str, int],
    reason: str,
) -> Path:
    """Return the file of the best plan for the hosts that are left of a run; say and note why.

    Parameters
    ----------
    request
        The run, on its present plan, from the checkpoint that it goes on from.
    present, ranks
        That plan, and how many of its ranks each host has.
    left
        The GPUs of the hosts that are left.
    reason
        Which hosts are lost or back.

    Raises
    ------
    ConfigError
        There is none, or the run cannot be prepared here.
    """
    if request.replan == "off":
        raise ConfigError("--replan auto would make one")
    nodes = tuple(ranks.values())
    launched = replace(request, launched_world=sum(nodes), found_nodes=nodes)
    planning = PlanningProcess(partial(_prepared_and_planned, launched, tuple(left.values())))
    try:
        found = planning.result(wait_s=None)
    finally:
        planning.end()
    assert found is not None
    step = request.resume_step or 0
    log.warning("%s", note_move(request.output_dir, found, present, step, reason))
    return save_plan(found.plan, request.output_dir / PLAN_FOLDER / f"step_{step}.yaml")


def _prepared_and_planned(request: TrainRequest, left: Sequence[int]) -> Proposal:
    """Prepare a run as rank 0 would, in a process that has its folder until it ends; plan it."""
    return survivors_plan(prepare(request), request.resume_step, left)
