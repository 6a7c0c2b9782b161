"""The adapters' optimiser: every task's own, its state shared by the holders of each block.

A block is the layers with the same holders; its data-parallel group is those holders, in the
tensor-parallel group and across replicas alike, since canonical adapters make the gradient a
plain sum over holders (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lobra.layout.order import AdamSettings
from lobra.layout.world import LayerBlock, World
from lobra.model.groups import new_group
from lobra.model.stage import Stage
from lobra.tasks.config import TaskConfig
from lobra.trainer.block import BlockOptimizer
from lobra.trainer.zero import kept_moments

#: Makes of the updated tasks' numbers, and of why updates failed on this rank, why they failed on
#: any, the same on every rank (`Control.agree`).
Agree = Callable[[Sequence[int], dict[int, str]], dict[int, str]]


def alone(_numbers: Sequence[int], own: dict[int, str]) -> dict[int, str]:
    """Return why updates failed where there is one rank."""
    return own


@dataclass(frozen=True)
class TaskUpdate:
    """What one step does to a task: whether its update is applied, the rate, the clipping factor.

    A task that is not applied keeps its weights and its moments exactly. With ``adam`` AdamW's
    settings change.
    """

    apply: bool
    learning_rate: float = 0.0
    clip: float = 1.0
    adam: AdamSettings | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What changes of torch's AdamW, in its names."""
        changed: dict[str, Any] = {"lr": self.learning_rate}
        if self.adam is not None:
            changed["betas"] = (self.adam.beta1, self.adam.beta2)
            changed["eps"] = self.adam.eps
            changed["weight_decay"] = self.adam.weight_decay
        return changed


class AdapterOptimizer:
    """The blocks this rank holds, walked in the same order on every rank."""

    def __init__(self, stage: Stage, world: World) -> None:
        """Optimise the adapters of a stage. Collective: every rank of the world calls it."""
        self.stage = stage
        self.blocks = own_blocks(world.blocks(stage.shape.num_layers), stage.device)
        self._moment_names: dict[int, tuple[str, ...]] = {}

    def install(self, number: int, task: TaskConfig | None = None) -> None:
        """Begin to optimise the adapter in a slot, as it is now, as its task says. Collective.

        Without a task it is AdamW, whose settings come with every update.

        Nothing of another task is touched, neither weights nor moments.
        """
        self._moment_names[number] = kept_moments(task)
        slot = self.stage.slots[number]
        for block in self.blocks:
            layers = block.block.layers
            span, rate_factors = slot.layout.span(layers), slot.layout.rate_factors(layers)
            block.install(number, slot.weights[span], slot.gradient[span], rate_factors, task)

    def remove(self, number: int) -> None:
        """Forget a task's optimiser state."""
        del self._moment_names[number]
        for block in self.blocks:
            block.remove(number)

    def reduce(self, numbers: Sequence[int]) -> Tensor:
        """Sum these tasks' gradients over each block's holders. Collective.

        Returns
        -------
        Tensor
            This rank's part of each task's squared gradient norm, fp64 [tasks], on the device. A
            rank owns one ZeRO partition of each block it holds and partitions are disjoint, so the
            sum over the world is the squared norm.
        """
        if not numbers:
            return torch.zeros(0, dtype=torch.float64, device=self.stage.device)
        return torch.stack([block.reduce(numbers) for block in self.blocks]).sum(dim=0)

    def update(self, updates: Mapping[int, TaskUpdate], agree: Agree = alone) -> dict[int, str]:
        """Apply updates to the reduced gradients; forget these tasks' gradients. Collective.

        An update that fails on one rank is made on none: the task keeps its weights.

        Parameters
        ----------
        updates
            By the tasks' numbers.
        agree
            By default there is one rank.

        Returns
        -------
        dict
            Of every task whose update failed, why.
        """
        applied = {number: update for number, update in updates.items() if update.apply}
        settings = {number: update.settings for number, update in applied.items()}
        clips = {number: update.clip for number, update in applied.items()}
        own: dict[int, str] = {}
        for block in self.blocks:
            own = {**block.update(settings, clips), **own}
        numbers = sorted(settings)
        failed = agree(numbers, own)
        updated = [number for number in numbers if number not in failed]
        for block in self.blocks:
            block.exchange(updated, sorted(failed))
        self.stage.forget_gradients(updates)
        self.stage.refresh()
        return failed

    def moments(self, number: int) -> dict[str, dict[range, Tensor]]:
        """Return a task's moments, flat, by the layers of a block, on the CPU. Collective.

        They are of the blocks this rank is the first holder of.
        """
        found: dict[str, dict[range, Tensor]] = {name: {} for name in self.moment_names(number)}
        for block in self.blocks:
            for moment, flat in block.moments(number).items():
                found[moment][block.block.layers] = flat
        return found

    def moment_names(self, number: int) -> tuple[str, ...]:
        """Return what a task's optimiser keeps of each of its weights."""
        return self._moment_names[number]

    def load_moments(
        self, number: int, moments: Mapping[str, Mapping[str, Tensor]], updates: int
    ) -> None:
        """Set the task's moments (PEFT's names) and its count of applied updates."""
        slot = self.stage.slots[number]
        flats = {}
        for moment, named in moments.items():
            flats[moment] = torch.empty_like(slot.weights, device="cpu")
            slot.layout.fill(flats[moment], named)
        for block in self.blocks:
            span = slot.layout.span(block.block.layers)
            own = {moment: flat[span] for moment, flat in flats.items()}
            block.load(number, own, updates)


def own_blocks(blocks: Iterable[LayerBlock], device: torch.device) -> list[BlockOptimizer]:
    """Return those of all blocks that this rank holds. Collective: every rank calls it alike."""
    groups = [(block, new_group(block.holders)) for block in blocks]
    return [BlockOptimizer(block, group, device) for block, group in groups if group is not None]
