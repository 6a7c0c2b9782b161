"""What is served: a base model on a plan, checked before anything is started."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.common.options import within_bounds
from lobra.common.words import counted
from lobra.layout.layout import Layout
from lobra.layout.placement import placed_on
from lobra.layout.plan import Plan, ReplicaGroup, load_plan
from lobra.layout.sequences import IntArray
from lobra.layout.shapes import ModelShape, layout_problem, read_shape
from lobra.layout.world import World
from lobra.model.checkpoint import checkpoint_problems
from lobra.model.fingerprint import fingerprint
from lobra.model.folder import resolve_folder
from lobra.planner.packed.dispatch import Cost, packed_costs
from lobra.profiler.cost_model import CostModel, load_cost_model
from lobra.profiler.hardware import available_memory_bytes, describe_device
from lobra.profiler.lookup import own_memory_path
from lobra.profiler.memory import parse_bytes
from lobra.profiler.profiles import default_time_path
from lobra.service.admission import Admission, admission_of
from lobra.service.request import ServeRequest
from lobra.service.state_folder import StateFolder, other_things
from lobra.service.wire import LossRequest, read_loss_request
from lobra.trainer.run_folder import unusable
from lobra.trainer.run_spec import RunSpec

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 8192  # of the plan that is deployed where none is given
ONE_MACHINE = (1 << 30,)  # all ranks are on this one, however many there are
CUDA_MEMORY_SHARE = 0.9  # that ranks may take, as `lobra profile memory` has it
PATH_PREFIX = "tinker://"


@dataclass(frozen=True, eq=False)
class Deployment:
    """A base model on a plan, and where what is trained on it is kept.

    Attributes
    ----------
    run
        What ranks must know; it has no tasks of its own.
    shape
        The base model's sizes.
    names
        What clients may call it, the first one being what they are told.
    costs, has_times
        What a micro-batch takes on each group of the plan; whether in ms, as profiled.
    max_slots, max_rank
        Models on the ranks at once, and the largest rank of an adapter.
    admission
        Which adapters the ranks' memory holds at once.
    """

    run: RunSpec
    shape: ModelShape
    names: tuple[str, ...]
    costs: Sequence[Cost]
    has_times: bool
    max_slots: int
    max_rank: int
    admission: Admission

    @property
    def state_folder(self) -> StateFolder:
        """Where all is kept that must not be forgotten."""
        return StateFolder(self.run.output_dir)

    @property
    def max_context(self) -> int:
        """The most tokens of a sequence that is sampled, its prompt included."""
        return self.shape.max_positions or DEFAULT_MAX_TOKENS

    def read_loss_request(self, message: Any) -> LossRequest:
        """Return what a `loss_message` asks for; ConfigError says what is wrong."""
        return read_loss_request(message, self.shape.vocab_size, self.run.plan.max_tokens)


def prepare_deployment(
    request: ServeRequest, slots: Sequence[int] = ONE_MACHINE, mistakes: Iterable[str] = ()
) -> Deployment:
    """Check what is to be served.

    Parameters
    ----------
    slots
        How many ranks each host takes, this one first.
    mistakes
        What is wrong beside.

    Raises
    ------
    ConfigError
        With every mistake found; nothing was written then.
    """
    request, problems = within_bounds(request)
    problems += mistakes
    unfit = unusable(request.state_dir, [Path(request.model)], "--state-dir")
    problems += unfit or other_things(request.state_dir)
    folder: Path | None = None
    shape: ModelShape | None = None
    plan: Plan | None = None
    with problems.noted():
        folder = resolve_folder(request.model)
        shape = read_shape(folder)
        problems += checkpoint_problems(folder, shape)
        if shape.quantised:
            problems.add(f"{folder}: its weights are in {shape.quantised}, which is not served")
    with problems.noted():
        plan = _plan(request, shape)
    if shape is not None and plan is not None:
        problems += [
            f"{request.strategy_config}: {problem} ({request.model})"
            for layout in {group.layout for group in plan.groups}
            if (problem := layout_problem(shape, layout.tp, layout.pp))
        ]
    device, world = "cpu", None
    if plan is not None:
        with problems.noted():
            device = _device(request, plan, slots)
        with problems.noted():
            world = placed_on(plan, request.strategy_config or str(plan), slots)
    cost_model: CostModel | None = None
    profile = Path(request.time_profile or default_time_path(request.model))
    if profile.is_file() or request.time_profile is not None:
        with problems.noted():
            cost_model = load_cost_model(request.model, request.time_profile)
    precision = request.precision or ("bf16" if device == "cuda" else "fp32")
    admission: Admission | None = None
    if shape is not None and plan is not None:
        with problems.noted():
            admission = _admission(request, shape, plan, precision, device, slots)
    problems.raise_if_any()
    assert folder and shape and plan and world and admission
    return Deployment(
        _run(request, folder, shape, plan, world, precision, device),
        shape,
        tuple(dict.fromkeys((request.name or request.model, request.model, folder.name))),
        *_costs(plan, cost_model, profile),
        request.max_slots,
        request.max_rank,
        admission,
    )


def _plan(request: ServeRequest, shape: ModelShape | None) -> Plan:
    if request.strategy_config is None:
        longest = (shape.max_positions if shape else None) or DEFAULT_MAX_TOKENS
        max_tokens = min(longest, DEFAULT_MAX_TOKENS)
        plan = Plan((ReplicaGroup(Layout(1, 1), 1, max_tokens),))
    else:
        plan = load_plan(request.strategy_config)
    return plan if request.memory is None else plan.with_memory(request.memory)


def _device(request: ServeRequest, plan: Plan, slots: Sequence[int]) -> str:
    import torch

    if plan.num_gpus > sum(slots):
        raise ConfigError(
            f"the plan {plan} has {counted(plan.num_gpus, 'rank')}, the hosts take "
            f"{sum(slots)}; give another plan, or more slots"
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if request.device == "cpu" or (request.device == "auto" and not found):
        return "cpu"
    if (needed := _on_this_host(plan, slots)) > found:
        raise ConfigError(
            f"the plan {plan} needs {counted(needed, 'GPU')} of this machine, which has {found}; "
            f"give --host-file for several machines, another plan, or --device cpu to run every "
            f"rank as a CPU process"
        )
    return "cuda"


def _on_this_host(plan: Plan, slots: Sequence[int]) -> int:
    """Return how many of a plan's ranks are on this host, the first one."""
    return min(plan.num_gpus, slots[0])


def _admission(
    request: ServeRequest,
    shape: ModelShape,
    plan: Plan,
    precision: str,
    device: str,
    slots: Sequence[int],
) -> Admission:
    """Return what the ranks hold; ConfigError if that is not one adapter, the smallest."""
    if request.memory_budget is not None:
        budget_bytes = parse_bytes(request.memory_budget)
    elif device == "cuda":
        budget_bytes = int(CUDA_MEMORY_SHARE * describe_device(device)["memory_bytes"])
    else:
        budget_bytes = available_memory_bytes() // _on_this_host(plan, slots)
    profile = request.memory_profile or own_memory_path(request.model, request.max_slots)
    given = profile if request.memory_profile is not None or profile.is_file() else None
    admission = admission_of(shape, plan, precision, device, budget_bytes, given)
    modules = tuple(shape.linear_sizes())
    if refusal := admission.refusal([(1, modules)]):
        raise ConfigError(
            f"{request.strategy_config or plan}: {refusal}, with one adapter of rank 1; give a "
            f"plan of smaller max_tokens, --memory lean or full, or another --memory-budget"
        )
    held = admission.most_slots((request.max_rank, modules), request.max_slots)
    if held < request.max_slots:
        log.info(
            "memory holds %d of the %d slots where all are of rank %d; others wait",
            held, request.max_slots, request.max_rank,
        )  # fmt: skip
    return admission


def _costs(plan: Plan, cost_model: CostModel | None, profile: Path) -> tuple[Sequence[Cost], bool]:
    """Return what micro-batches take: as profiled, else by their tokens; and which of them."""
    known = cost_model is not None and all(cost_model.has(g.layout) for g in plan.groups)
    if cost_model is not None and known:
        return packed_costs(plan, cost_model), True
    if len(plan.groups) > 1:
        log.warning(
            "%s: no times of all layouts of the plan %s: work is shared out by tokens and tp; "
            "measure them with lobra profile time",
            profile, plan,
        )  # fmt: skip
    return [partial(_by_tokens, group.layout.num_gpus) for group in plan.groups], False


def _by_tokens(num_gpus: int, tokens: IntArray, squares: IntArray) -> np.ndarray:
    return tokens / num_gpus


def _run(
    request: ServeRequest,
    folder: Path,
    shape: ModelShape,
    plan: Plan,
    world: World,
    precision: str,
    device: str,
) -> RunSpec:
    """Return what ranks must know."""
    return RunSpec(
        model_folder=folder,
        base_model=str(folder.resolve()),
        fingerprint=fingerprint(folder, shape),
        task_records=(),
        tasks=(),
        num_steps=(),
        last_step=0,
        plan=plan,
        world=world,
        cost_model=CostModel(shape.num_layers, "fitted", {}),
        output_dir=request.state_dir.resolve(),
        precision=precision,
        device=device,
        num_buckets=1,
        dynamic_buckets=True,
        buckets=(),
        dispatch_mode="balance",
        seed=0,
        hang_timeout_s=request.hang_timeout,
    )
