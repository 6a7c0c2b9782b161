"""A rank function that notes which sequences a rank's replica trains."""

from __future__ import annotations

from dataclasses import dataclass

from lobra.layout.order import StepOrder
from lobra.model.micro_batch import MicroBatchTensors
from lobra.trainer.engine import Engine
from lobra.trainer.rank import RankResult, train_rank
from lobra.trainer.run_spec import RunSpec


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
    """Train and record."""
    plain = Engine._tensors
    trained: list[TrainedMicroBatch] = []

    def noted(self: Engine, order: StepOrder) -> list[MicroBatchTensors]:
        place = self.place
        if order.updates and place.owns_loss:
            for batch in order.replicas[place.replica]:
                rows = tuple((sequence.task, sequence.index) for sequence in batch.sequences)
                trained.append(TrainedMicroBatch(order.step, place.replica, rows))
        return plain(self, order)

    Engine._tensors = noted  # type: ignore[method-assign]
    result = train_rank(run)
    return RecordedResult(**vars(result), trained=tuple(trained))
