"""One DeepSpeed ZeRO-1 engine per layer block, over exactly the ranks that hold it.

DeepSpeed's own notion of a rectangular data-parallel grid does not fit a heterogeneous plan. Here
each engine owns only adapters, and its data-parallel group is the block's holders: inside a
tensor-parallel group and across replicas alike, since canonical adapters make the gradient a
plain sum over holders (docs/architecture.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.lora import AdapterBank
from model.topology import Grid, LayerBlock, layer_blocks
from tasks.config import TaskConfig
from trainer.optimizer import clip_coefficient, task_optimizer

log = logging.getLogger(__name__)

ENGINE_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 1,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "compute_grad_norm": False,
    },
    "zero_allow_untested_optimizer": True,
    "gradient_allreduce_op": "sum",
    "gradient_clipping": 0.0,  # clipping is per task, below
    "steps_per_print": 10**9,
}


class _HolderGroup:
    """What DeepSpeed asks of `mpu`: the data-parallel group is the block's holders.

    The model-parallel size is reported as 1 everywhere: DeepSpeed would otherwise divide norms
    by sizes that differ between replicas.
    """

    def __init__(self, group: dist.ProcessGroup, solo: dist.ProcessGroup) -> None:
        self.group = group
        self.solo = solo

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.solo

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@dataclass(frozen=True)
class TaskUpdate:
    """What one step is to do with a task: its learning rate, and whether it takes part."""

    learning_rate: float
    active: bool


@dataclass(frozen=True)
class UpdateResult:
    """Each task's gradient norm before clipping, and whether its update was applied."""

    grad_norms: tuple[float, ...]
    applied: tuple[bool, ...]


class AdapterOptimizer:
    """The engines of the blocks this rank holds, walked in the same order on every rank."""

    def __init__(
        self,
        tasks: Sequence[TaskConfig],
        bank: AdapterBank,
        grids: Sequence[Grid],
        num_layers: int,
        control_group: dist.ProcessGroup,
    ) -> None:
        """Create the engines. Collective: every rank of the world calls it with the same plan."""
        self.tasks = tuple(tasks)
        self.control_group = control_group
        self.blocks: list[LayerBlock] = []
        self.parameters: list[list[list[nn.Parameter]]] = []
        self.engines: list[Any] = []
        rank, world = dist.get_rank(), dist.get_world_size()
        solo = None
        for member in range(world):
            group = dist.new_group([member])
            solo = group if member == rank else solo
        assert solo is not None
        for block in layer_blocks(grids, num_layers):
            group = dist.new_group(list(block.holders))
            if rank not in block.holders:
                continue
            parameters = [bank.parameters(t, block.layers) for t in range(len(self.tasks))]
            self.blocks.append(block)
            self.parameters.append(parameters)
            self.engines.append(self._engine(parameters, _HolderGroup(group, solo)))

    def _engine(self, parameters: list[list[nn.Parameter]], mpu: _HolderGroup) -> Any:
        import deepspeed

        module = nn.Module()
        module.adapters = nn.ParameterList(p for own in parameters for p in own)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=task_optimizer(self.tasks, parameters),
            config=dict(ENGINE_CONFIG),
            mpu=mpu,
            dist_init_required=False,
        )
        return engine

    def step(self, updates: Sequence[TaskUpdate]) -> UpdateResult:
        """Sum the gradients over the holders, clip each task by its own norm, update.

        A task whose gradient is not finite is skipped without touching the others. Collective.
        """
        for engine, parameters in zip(self.engines, self.parameters, strict=True):
            for own in parameters:
                for parameter in own:  # what did not run here still takes part in the sum
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            engine.set_gradient_accumulation_boundary(True)
            engine.allreduce_gradients()
        norms = self._gradient_norms()
        applied = tuple(
            update.active and math.isfinite(norm)
            for update, norm in zip(updates, norms, strict=True)
        )
        for engine in self.engines:
            for task, update in enumerate(updates):
                group = engine.optimizer.param_groups[task]
                group["lr"] = update.learning_rate
                group["skip"] = not applied[task]
                if applied[task]:
                    factor = clip_coefficient(norms[task], self.tasks[task].max_grad_norm)
                    if factor < 1.0:
                        for gradient in engine.optimizer.averaged_gradients[task]:
                            gradient.mul_(factor)
            engine.step()
        return UpdateResult(norms, applied)

    def _gradient_norms(self) -> tuple[float, ...]:
        """Return each task's gradient norm over all layers.

        After the reduction a rank owns one ZeRO partition of each block it holds, the partitions
        are disjoint, so the squared norms add up over the world.
        """
        squared = torch.zeros(len(self.tasks), dtype=torch.float64)
        for engine in self.engines:
            for task in range(len(self.tasks)):
                squared[task] += sum(
                    float(_squared_norm(g)) for g in engine.optimizer.averaged_gradients[task]
                )
        dist.all_reduce(squared, group=self.control_group)
        return tuple(squared.sqrt().tolist())


def _squared_norm(gradient: Tensor) -> Tensor:
    return gradient.double().square().sum()
