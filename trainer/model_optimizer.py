"""The optimiser of a model that is trained whole: ZeRO-1 partitions of each shard among replicas.

Weights are in two pieces, those that decay and biases and norms, which do not: as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lobra.layout.world import World
from lobra.model.checkpoint import CheckpointReader
from lobra.model.stage import Stage
from lobra.model.trained_stage import TrainedWeights
from lobra.tasks.config import TaskConfig
from lobra.trainer.optimizer import AdapterOptimizer, Agree, TaskUpdate, alone, own_blocks
from lobra.trainer.zero import MASTER, kept_moments


class ModelOptimizer(AdapterOptimizer):
    """The optimiser of this rank's shard, in the place of the adapters'."""

    def __init__(self, stage: Stage, weights: TrainedWeights, world: World) -> None:
        """Optimise a stage's weights. Collective: every rank of the world calls it."""
        self.stage, self.trained = stage, weights
        self.blocks = own_blocks(world.shard_blocks(stage.shape.num_layers), weights.weights.device)
        self.pieces: dict[int, slice] = {}
        self._moment_names = {}

    def install(self, number: int, task: TaskConfig | None = None) -> None:
        """Begin to optimise the weights as they are now, as the task says. Collective."""
        assert task is not None, "a model's task says how it is optimised"
        self._moment_names[number] = kept_moments(task)
        (block,) = self.blocks
        split, stop = self.trained.num_decayed, len(self.trained.weights)
        own = {0: (slice(0, split), task), 1: (slice(split, stop), replace(task, weight_decay=0.0))}
        for piece, (place, of_task) in own.items():
            if place.start < place.stop:
                self.pieces[piece] = place
                weights, gradient = self.trained.weights[place], self.trained.gradient[place]
                factors = [(len(weights), 1.0)]
                block.install(piece, weights, gradient, factors, of_task)

    def reduce(self, numbers: Sequence[int]) -> Tensor:
        """Sum the gradients over the replicas; return this rank's part of the squared norm."""
        if not numbers:
            return torch.zeros(0, dtype=torch.float64, device=self.trained.weights.device)
        self.trained.sum_partial_gradients()
        (block,) = self.blocks
        return block.reduce(list(self.pieces)).sum(dim=0, keepdim=True)

    def update(self, updates: Mapping[int, TaskUpdate], agree: Agree = alone) -> dict[int, str]:
        """Apply the update to the reduced gradients; forget them. Collective.

        It is made on every rank or on none, as `AdapterOptimizer.update` says.
        """
        (block,) = self.blocks
        ((number, update),) = updates.items()
        pieces = list(self.pieces) if update.apply else []
        settings = dict.fromkeys(pieces, update.settings)
        why = list(block.update(settings, dict.fromkeys(pieces, update.clip)).values())
        failed = agree([number] if pieces else [], {number: why[0]} if why else {})
        block.exchange([] if failed else pieces, pieces if failed else [])
        self.trained.share()
        self.trained.gradient.zero_()
        return failed

    def whole(self, name: str) -> Tensor | None:
        """Return one of the moments, or `MASTER`, of all of `weights`, on the CPU. Collective.

        The shard's first holder gets it, the others nothing.
        """
        (block,) = self.blocks
        found: list[Tensor] = []
        for piece in self.pieces:
            partition = block.partitions[piece]
            own = partition.master_p if name == MASTER else partition.moments[name]
            found += block.whole(piece, {name: own}).values()
        return torch.cat(found) if found else None

    def load(self, folders: Mapping[str, Path], updates: int) -> None:
        """Take over moments and `MASTER` from folders of tensors, and the count of updates."""
        (block,) = self.blocks
        device = torch.device("cpu")
        for name, folder in folders.items():
            flat = self.trained.read(CheckpointReader(folder, self.trained.gradient.dtype, device))
            for piece, place in self.pieces.items():
                block.load(piece, {name: flat[place]}, updates)
