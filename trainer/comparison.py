"""What answers are compared with: what the base model thinks of them, before a step's own pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lobra.layout import sequences as layout
from lobra.layout.order import StepOrder
from lobra.layout.sequences import MicroBatch
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors
from lobra.model.objectives import ExampleWeights
from lobra.model.pipeline import evaluate_replica
from lobra.model.precision import kept_dtype
from lobra.model.stage import Stage
from lobra.tasks.objectives import Objective


def example_weights(
    order: StepOrder, objectives: Mapping[int, Objective]
) -> dict[int, ExampleWeights]:
    """Return what the examples of an order count for, by task: losses are means over the order."""
    num_targets = dict.fromkeys(order.num_examples, 0)
    for sequence in order.sequences:
        if sequence.sign > 0 and sequence.num_answer:
            num_targets[sequence.task] += len(sequence.targets)
    return {
        task: ExampleWeights(
            objectives[task],
            1.0 / count,
            objectives[task].token_weight / max(1, num_targets[task]),
        )
        for task, count in order.num_examples.items()
    }


def learned_part(micro_batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch without the sequences that others are only compared with."""
    part = _part(micro_batch, lambda sequence: not sequence.is_compared)
    assert part is not None, "what is compared is part of an example"
    return part


class Comparison:
    """The passes without gradient that examples need, on one replica.

    Sequences of tasks with a reference are computed without adapters; those that are only compared
    with also with theirs. Dropout is off.
    """

    def __init__(
        self,
        stage: Stage,
        micro_batches: Sequence[MicroBatch],
        weights: Mapping[int, ExampleWeights],
        num_tasks: int,
    ) -> None:
        self.stage = stage
        self.micro_batches = micro_batches
        self.weights = weights
        self.num_tasks = num_tasks
        self.tasks = {task for task, own in weights.items() if own.objective.has_reference}

    def references(self) -> list[Tensor | None]:
        """Return of every micro-batch the base model's log-probabilities [N] of its answers.

        None where no task has a reference, and of all but on the last stage. N are all of its
        sequences; those without a reference have 0.
        """
        return self._answers(lambda sequence: sequence.task in self.tasks, with_adapters=False)

    def gains(self, references: Sequence[Tensor | None]) -> Tensor:
        """Return how much likelier this replica's compared answers are than by the base model.

        Summed by task: float64 [num_tasks], on a CPU; 0 but on the last stage.
        """
        gained = torch.zeros(self.num_tasks, dtype=torch.float64)
        policies = self._answers(lambda sequence: sequence.is_compared, with_adapters=True)
        for micro_batch, own, reference in zip(
            self.micro_batches, policies, references, strict=True
        ):
            if own is None or reference is None:
                continue
            tasks = torch.tensor([one.task for one in micro_batch.sequences])
            is_compared = torch.tensor([one.is_compared for one in micro_batch.sequences])
            gained.index_add_(0, tasks, (own - reference).cpu().double() * is_compared)
        return gained

    def divergence(self, gained: Tensor) -> Tensor:
        """Return every task's mean gain, at least 0, of the sums of all replicas: [num_tasks]."""
        shares = torch.zeros_like(gained)
        for task, own in self.weights.items():
            shares[task] = own.of_example
        return (gained * shares).clamp(min=0)

    def compared(
        self,
        batches: Sequence[MicroBatchTensors],
        references: Sequence[Tensor | None],
        divergence: Tensor,
    ) -> list[MicroBatchTensors]:
        """Return the tensors of the micro-batches' learned parts with what these compare with."""
        sent = divergence.to(self.stage.device, kept_dtype(self.stage.dtype))
        found = []
        for micro_batch, batch, reference in zip(
            self.micro_batches, batches, references, strict=True
        ):
            if batch.examples is not None and reference is not None:
                is_learned = [not one.is_compared for one in micro_batch.sequences]
                places = torch.tensor(is_learned).nonzero().flatten().to(reference.device)
                examples = replace(batch.examples, reference_N=reference[places], divergence=sent)
                batch = replace(batch, examples=examples)
            found.append(batch)
        return found

    def _answers(
        self, is_wanted: Callable[[layout.Sequence], bool], with_adapters: bool
    ) -> list[Tensor | None]:
        parts = [_part(micro_batch, is_wanted) for micro_batch in self.micro_batches]
        if not any(parts):
            return [None] * len(parts)
        batches = micro_batch_tensors(
            [part for part in parts if part is not None],
            np.zeros(self.num_tasks),
            self.stage.device,
            self.stage.dtype,
        )
        if not with_adapters:
            batches = [batch.without_adapters() for batch in batches]
        token_losses: list[Tensor] = []
        evaluate_replica(self.stage, batches, self.num_tasks, token_losses)
        found: list[Tensor | None] = [None] * len(parts)
        present = iter(zip(batches, token_losses, strict=False))  # no losses but on the last stage
        for place, (micro_batch, part) in enumerate(zip(self.micro_batches, parts, strict=True)):
            if part is None or not token_losses:
                continue
            batch, losses_P = next(present)
            assert batch.examples is not None
            answers = batch.examples.answers(losses_P)
            places = [k for k, one in enumerate(micro_batch.sequences) if is_wanted(one)]
            whole = answers.new_zeros(len(micro_batch.sequences))
            found[place] = whole.index_copy(0, torch.tensor(places).to(whole.device), answers)
        return found


def _part(
    micro_batch: MicroBatch, is_wanted: Callable[[layout.Sequence], bool]
) -> MicroBatch | None:
    sequences = tuple(filter(is_wanted, micro_batch.sequences))
    return MicroBatch(sequences, micro_batch.padded_length) if sequences else None
