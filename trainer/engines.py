"""The adapters' optimiser: one DeepSpeed engine (ZeRO stage 1) per layer block.

A block is the layers with the same holders; its data-parallel group is those holders, in the
tensor-parallel group and across replicas alike, since canonical adapters make the gradient a
plain sum over holders (docs/architecture.md).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lobra.layout.world import World
from lobra.model.groups import new_group
from lobra.model.lora import AdapterBank
from lobra.tasks.config import TaskConfig
from lobra.trainer.block import MOMENTS, BlockOptimizer

__all__ = ["MOMENTS", "AdapterOptimizer", "TaskUpdate", "start_deepspeed"]


@dataclass(frozen=True)
class TaskUpdate:
    """What one step does to a task: whether its update is applied, the rate, the clipping factor.

    A task that is not applied keeps its weights and its moments exactly.
    """

    apply: bool
    learning_rate: float = 0.0
    clip: float = 1.0


class AdapterOptimizer:
    """The blocks this rank holds, walked in the same order on every rank."""

    def __init__(
        self,
        tasks: Sequence[TaskConfig],
        bank: AdapterBank,
        world: World,
        num_layers: int,
    ) -> None:
        """Create the engines. Collective: every rank of the world calls it with the same."""
        self.num_tasks = len(tasks)
        self.bank = bank
        self.blocks: list[BlockOptimizer] = []
        for block in world.blocks(num_layers):
            group = new_group(block.holders)
            if group is not None:
                self.blocks.append(BlockOptimizer(tasks, bank, block, group))

    def reduce(self, takes_part: Sequence[bool]) -> Tensor:
        """Sum the gradients of the tasks that take part over each block's holders. Collective.

        Returns:
            This rank's part of each task's squared gradient norm, fp64 [num_tasks], on the device.
            A rank owns one ZeRO partition of each block it holds and partitions are disjoint, so
            the sum over the world is the squared norm.
        """
        return torch.stack([block.reduce(takes_part) for block in self.blocks]).sum(dim=0)

    def update(self, updates: Sequence[TaskUpdate]) -> None:
        """Apply each task's update to the reduced gradients and forget them. Collective."""
        applied = {task: update for task, update in enumerate(updates) if update.apply}
        rates = {task: update.learning_rate for task, update in applied.items()}
        clips = {task: update.clip for task, update in applied.items()}
        for block in self.blocks:
            block.update(rates, clips)

    def moments(self, task: int) -> dict[str, dict[str, Tensor]]:
        """Return the task's Adam moments by PEFT's names, on the CPU. Collective.

        They are of the layers whose blocks this rank is the first holder of.
        """
        names = self._names(task)
        found: dict[str, dict[str, Tensor]] = {moment: {} for moment in MOMENTS}
        for block in self.blocks:
            for moment, values in block.moments(task).items():
                for parameter, value in zip(block.parameters[task], values, strict=False):
                    found[moment][names[parameter]] = value
        return found

    def load_moments(
        self, task: int, moments: Mapping[str, Mapping[str, Tensor]], updates: int
    ) -> None:
        """Set the task's Adam moments (PEFT's names) and its count of applied updates."""
        names = self._names(task)
        for block in self.blocks:
            own = {
                moment: [moments[moment][names[parameter]] for parameter in block.parameters[task]]
                for moment in MOMENTS
            }
            block.load_moments(task, own, updates)

    def _names(self, task: int) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.bank.named_parameters(task).items()}


def start_deepspeed(device: str) -> None:
    """Bring up deepspeed over the process group that exists, quietly and without a compiler."""
    import deepspeed.ops

    # On CPU deepspeed would otherwise JIT-build a shared-memory extension (35 s, needs a compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # deepspeed 0.19 calls what torch 2.13 has renamed; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
