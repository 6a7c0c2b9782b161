"""The plan of a run: whether the model and this machine, or a launcher's, can carry it out."""

from __future__ import annotations

import logging
import math
import os

from lobra.common.errors import ConfigError
from lobra.common.words import counted
from lobra.layout.base_precision import plan_problem, takes_more
from lobra.layout.placement import placed_on
from lobra.layout.plan import Plan, load_plan
from lobra.layout.shapes import ModelShape, layout_problem
from lobra.layout.world import World
from lobra.trainer.request import TrainRequest

log = logging.getLogger(__name__)

RANK_BYTES = 64 << 20  # of its own, the least that a rank's process takes on a CPU
ONE_MACHINE = 1 << 30  # a CPU machine is one node, however many ranks it runs


def requested_plan(request: TrainRequest) -> Plan:
    """Return the plan, under the memory policy that was asked for.

    Raises
    ------
    ConfigError
        The plan's file is not usable, or there is no such policy.
    """
    plan = load_plan(request.strategy_config)
    return plan if request.memory is None else plan.with_memory(request.memory)


def rank_problems(request: TrainRequest, plan: Plan) -> list[str]:
    """Return why a plan has not the ranks that may be used, or that a launcher has started."""
    problems = []
    if request.num_gpus is not None and plan.num_gpus > request.num_gpus:
        problems.append(
            f"{request.strategy_config}: the plan {plan} needs {plan.num_gpus} ranks, but only "
            f"{counted(request.num_gpus, 'GPU')} may be used; plan for that number"
        )
    launched = request.launched_world
    if launched is not None and plan.num_gpus != launched:
        problems.append(
            f"{request.strategy_config}: the plan {plan} has {plan.num_gpus} ranks, the launcher "
            f"started {launched}; start one process per rank"
        )
    return problems


def layout_problems(request: TrainRequest, plan: Plan, shape: ModelShape) -> list[str]:
    """Return why a model cannot run a plan; warn of one that leaves less room than there is."""
    problems = [
        f"{request.strategy_config}: {problem} ({request.model})"
        for layout in {group.layout for group in plan.groups}
        if (problem := layout_problem(shape, layout.tp, layout.pp))
    ]
    made_for = plan.meta.get("base_precision")
    if problem := plan_problem(made_for, shape.quantised):
        problems.append(f"{request.strategy_config}: {problem}")
    elif plan.meta and takes_more(made_for, shape.quantised):
        log.warning(
            "%s: was made for a base that takes more memory than one in %s: plan again, and its "
            "micro-batches may be larger",
            request.strategy_config, shape.quantised,
        )  # fmt: skip
    return problems


def chosen_device(request: TrainRequest, plan: Plan | None) -> str:
    """Return "cuda" or "cpu", as asked for, else whether there is a GPU.

    Raises
    ------
    ConfigError
        There is no such device, or this machine has not as many of it as the plan needs.
    """
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = request.device
    if device == "auto":
        device = "cuda" if found else "cpu"
    if device == "cuda" and not found:
        raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    if request.launched_world is not None or plan is None:
        return device
    if device == "cuda" and plan.num_gpus > found:
        raise ConfigError(
            f"{request.strategy_config}: the plan {plan} needs {counted(plan.num_gpus, 'GPU')}, "
            f"this machine has {found}: {plan.num_gpus - found} missing; give --host-file for "
            f"several machines, or --device cpu to run every rank as a CPU process"
        )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = plan.num_gpus * RANK_BYTES
    if device == "cpu" and needed > there:
        raise ConfigError(
            f"{request.strategy_config}: the plan {plan} needs {plan.num_gpus} ranks, which as "
            f"CPU processes take {needed / 2**30:.0f} GiB or more, this machine has "
            f"{there / 2**30:.0f}; plan for fewer"
        )
    return device


def node_sizes(request: TrainRequest, device: str | None) -> int | tuple[int, ...]:
    """Return how many of the plan's ranks every node holds, or each.

    As asked for, else as the launcher started them, else the GPUs of this machine.
    """
    import torch

    if request.gpus_per_node is not None:
        return request.gpus_per_node
    if request.found_nodes is not None:
        return request.found_nodes
    return torch.cuda.device_count() if device == "cuda" else ONE_MACHINE


def common_node_size(request: TrainRequest, device: str) -> int:
    """Return how many ranks in a row are on one node, wherever they begin."""
    nodes = node_sizes(request, device)
    return math.gcd(*nodes) if isinstance(nodes, tuple) else nodes


def place_plan(plan: Plan, request: TrainRequest, device: str | None) -> World:
    """Return the plan on this cluster's nodes; ConfigError if it cannot be placed on them."""
    return placed_on(plan, request.strategy_config, node_sizes(request, device))
