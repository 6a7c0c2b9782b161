"""A rank function that notes which sequences a rank's replica trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lobra.layout.sequences import StepOrder
from lobra.model.stage import MicroBatchTensors
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.worker import RankResult, Worker, train_rank


@dataclass(frozen=True)
class TrainedMicroBatch:
    """What one replica trained in one micro-batch: (task, place in its data) of each row."""

    step: int
    replica: int
    sequences: tuple[tuple[int, int], ...]


@dataclass
class RecordedResult(RankResult):
    """What a rank reports; of a replica's ranks only the one whose losses count has `trained`."""

    trained: tuple[TrainedMicroBatch, ...] = ()


def train_recorded(run: RunSpec) -> RecordedResult:
    """Train and record. Of a run without validation: its sequences would be noted too."""
    assert not run.validate_every
    plain = Worker._tensors
    trained: list[TrainedMicroBatch] = []

    def noted(
        self: Worker, order: StepOrder, weights: torch.Tensor, noise: int
    ) -> list[MicroBatchTensors]:
        place = self.place
        for batch in order.replicas[place.replica] if place.owns_loss else ():
            rows = tuple((sequence.task, sequence.index) for sequence in batch.sequences)
            trained.append(TrainedMicroBatch(order.step, place.replica, rows))
        return plain(self, order, weights, noise)

    Worker._tensors = noted  # type: ignore[method-assign]
    result = train_rank(run)
    return RecordedResult(**vars(result), trained=tuple(trained))
