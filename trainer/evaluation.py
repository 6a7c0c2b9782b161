"""Validation: the loss of the sequences that `validation_split` holds out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lobra.model.pipeline import evaluate_replica
from lobra.model.precision import kept_dtype
from lobra.model.stage import MicroBatchTensors, Stage
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import GlobalBatch, IntArray, count_targets, target_tokens, whole_batch
from lobra.trainer.dispatcher import Running, StepDispatch, broadcast_array, decode
from lobra.trainer.figures import exchange_figures

Datasets = Sequence[TokenizedDataset | None]
Assign = Callable[[GlobalBatch], IntArray]
MakeTensors = Callable[
    [GlobalBatch, StepDispatch, Datasets, torch.Tensor, int], list[MicroBatchTensors]
]


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

    The assignment is solved once for as long as the same tasks run: the sequences are always the
    same.
    """

    def __init__(
        self,
        stage: Stage,
        held_out: Datasets,
        assign: Assign,
        make_tensors: MakeTensors,
        group: dist.ProcessGroup,
    ) -> None:
        """Keep what is needed.

        Args:
            stage: this rank's share of the model.
            held_out: each task's held-out sequences, None where there are none.
            assign: returns the encoded assignment of a batch (called on rank 0 only).
            make_tensors: returns this rank's micro-batches of an assigned batch.
            group: a CPU group of the whole world.
        """
        self.stage = stage
        self.held_out = held_out
        self.counts = [None if data is None else count_targets(data) for data in held_out]
        self.assign = assign
        self.make_tensors = make_tensors
        self.group = group
        self.solved: tuple[Running, StepDispatch] | None = None

    def evaluate(self, running: Running) -> Evaluation:
        """Return the losses of the running tasks' held-out data. Collective."""
        data = [own if runs else None for own, runs in zip(self.held_out, running, strict=True)]
        batch = whole_batch(data)
        if not len(batch):
            return Evaluation()
        if self.solved is None or self.solved[0] != running:
            flat = self.assign(batch) if dist.get_rank() == 0 else None
            flat = broadcast_array(flat, self.group)
            assert flat is not None
            self.solved = (running, decode(flat))
        num_tasks = len(running)
        kept = kept_dtype(self.stage.dtype)
        no_weights = torch.zeros(num_tasks, dtype=kept, device=self.stage.device)
        batches = self.make_tensors(batch, self.solved[1], data, no_weights, 0)
        losses = evaluate_replica(self.stage, batches, num_tasks)
        if not self.stage.groups.place.owns_loss:
            losses = torch.zeros_like(losses)  # its TP peers computed the same
        nothing = torch.zeros(num_tasks, dtype=torch.float64)
        figures = exchange_figures(losses, nothing, 0.0, 0.0, self.group)
        counts = target_tokens(batch, self.counts)
        return Evaluation(
            {task: figures.losses[task] / int(n) for task, n in enumerate(counts) if n},
            figures.memory_bytes,
        )
