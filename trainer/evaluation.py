"""Validation: the loss of the sequences that `validation_split` holds out."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lobra.layout.sequences import Sequence, StepOrder
from lobra.model.pipeline import evaluate_replica
from lobra.model.precision import kept_dtype
from lobra.model.stage import MicroBatchTensors, Stage
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import all_sequences
from lobra.trainer.dispatcher import Running, broadcast_array
from lobra.trainer.figures import exchange_figures

Assign = Callable[[int, list[Sequence]], StepOrder]
MakeTensors = Callable[[StepOrder, torch.Tensor, int], list[MicroBatchTensors]]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: by task its mean loss per target token.

    `memory_bytes[rank]` is the rank's peak since the step before, as in `StepFigures`; empty where
    there was nothing to evaluate.
    """

    losses: Mapping[int, float] = field(default_factory=dict)
    memory_bytes: tuple[int, ...] = ()


class Evaluator:
    """Computes held-out losses on one rank of the world.

    The order is made and sent once for as long as the same tasks run: the sequences are always the
    same.
    """

    def __init__(
        self,
        stage: Stage,
        held_out: abc.Sequence[TokenizedDataset | None],
        assign: Assign,
        make_tensors: MakeTensors,
        group: dist.ProcessGroup,
    ) -> None:
        """Keep what is needed.

        Args:
            stage: this rank's share of the model.
            held_out: on rank 0 each task's held-out sequences, None where there are none.
            assign: returns the order of sequences (called on rank 0 only).
            make_tensors: returns this rank's micro-batches of an order.
            group: a CPU group of the whole world.
        """
        self.stage = stage
        self.held_out = held_out
        self.assign = assign
        self.make_tensors = make_tensors
        self.group = group
        self.kept: tuple[Running, StepOrder] | None = None

    def _order(self, running: Running) -> StepOrder:
        """Return the order of the running tasks' held-out sequences. Collective."""
        if self.kept is None or self.kept[0] != running:
            flat = None
            if dist.get_rank() == 0:
                pairs = zip(self.held_out, running, strict=True)
                sequences = all_sequences([own if runs else None for own, runs in pairs])
                order = self.assign(0, sequences) if sequences else StepOrder(0)
                flat = order.encode()
            self.kept = (running, StepOrder.decode(broadcast_array(flat, self.group)))
        return self.kept[1]

    def evaluate(self, running: Running) -> Evaluation:
        """Return the losses of the running tasks' held-out data. Collective."""
        order = self._order(running)
        if not order.sequences:
            return Evaluation()
        num_tasks = len(running)
        kept = kept_dtype(self.stage.dtype)
        no_weights = torch.zeros(num_tasks, dtype=kept, device=self.stage.device)
        batches = self.make_tensors(order, no_weights, 0)
        losses = evaluate_replica(self.stage, batches, num_tasks)
        if not self.stage.groups.place.owns_loss:
            losses = torch.zeros_like(losses)  # its TP peers computed the same
        nothing = torch.zeros(num_tasks, dtype=torch.float64)
        figures = exchange_figures(losses, nothing, 0.0, 0.0, self.group)
        labels = [work.labels for work in order.task_work(num_tasks)]
        return Evaluation(
            {task: figures.losses[task] / count for task, count in enumerate(labels) if count},
            figures.memory_bytes,
        )
