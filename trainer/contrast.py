"""The pass before a step that finds by what pairs are contrasted (`model.contrast`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from lobra.layout import sequences as layout
from lobra.layout.order import StepOrder
from lobra.layout.sequences import MicroBatch
from lobra.model.contrast import Contrast, Pull, contrast
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors
from lobra.model.pipeline import evaluate_replica
from lobra.model.precision import kept_dtype
from lobra.model.stage import Stage
from lobra.tasks.objectives import CIT, Objective
from lobra.trainer.control import Control


class ContrastPass:
    """One replica's part of it, and what it gives to the step. Collective."""

    def __init__(
        self,
        stage: Stage,
        control: Control,
        order: StepOrder,
        objectives: Mapping[int, Objective],
        num_tasks: int,
    ) -> None:
        """Find the states of all contrasted sequences of an order; with dropout if it trains."""
        self.stage = stage
        self.objectives = {
            task: objectives[task] for task in order.num_examples if objectives[task].kind == CIT
        }
        self.contrasts: dict[int, Contrast] = {}
        if not self.objectives:
            return
        place = stage.groups.place
        of_replicas = [
            [one for micro_batch in own for one in self._own(micro_batch)] for own in order.replicas
        ]
        self.sequences = list(chain(*of_replicas))
        self.start = sum(map(len, of_replicas[: place.replica]))
        token_losses = torch.zeros(num_tasks, dtype=torch.float64)
        states_ND = torch.zeros(len(self.sequences), stage.shape.hidden_size, dtype=torch.float64)
        losses, ends = self._evaluated(
            order.replicas[place.replica], num_tasks, bool(order.updates)
        )
        if place.owns_loss and ends:  # its TP peers computed the same
            token_losses += losses.cpu()
            stop = self.start + sum(map(len, ends))
            states_ND[self.start : stop] = torch.cat(ends).cpu().double()
        control.sum_everywhere(token_losses)
        control.sum_everywhere(states_ND)
        tasks = torch.tensor([one.task for one in self.sequences])
        for task, objective in self.objectives.items():
            mean_loss = float(token_losses[task]) / order.work[task].labels
            self.contrasts[task] = contrast(
                states_ND[tasks == task],
                objective.temperature,
                objective.contrast_weight,
                mean_loss,
            )

    def pulled(
        self, micro_batches: Sequence[MicroBatch], batches: Sequence[MicroBatchTensors]
    ) -> list[MicroBatchTensors]:
        """Return the tensors of this replica's micro-batches with what pulls their states."""
        if not self.objectives:
            return list(batches)
        gradients = {task: iter(own.gradient_ND) for task, own in self.contrasts.items()}
        rows = [next(gradients[one.task]) for one in self.sequences]
        found, start = [], self.start
        dtype = kept_dtype(self.stage.dtype)
        for micro_batch, batch in zip(micro_batches, batches, strict=True):
            learned = [one for one in micro_batch.sequences if not one.is_compared]
            places = [k for k, one in enumerate(learned) if one.task in self.objectives]
            own = rows[start : start + len(places)]
            start += len(places)
            if places:
                places_N = batch.ends_N[torch.tensor(places).to(self.stage.device)]
                gradient_ND = torch.stack(own).to(self.stage.device, dtype)
                batch = replace(batch, pull=Pull(places_N, gradient_ND))
            found.append(batch)
        return found

    def _own(self, micro_batch: MicroBatch) -> tuple[layout.Sequence, ...]:
        return tuple(one for one in micro_batch.sequences if one.task in self.objectives)

    def _evaluated(
        self, micro_batches: Sequence[MicroBatch], num_tasks: int, with_dropout: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the summed losses of tasks and, on the last stage, the states [N, D]."""
        parts = [
            MicroBatch(own, micro_batch.padded_length)
            for micro_batch in micro_batches
            if (own := self._own(micro_batch))
        ]
        stage, ends = self.stage, list[Tensor]()
        if not parts:
            return torch.zeros(num_tasks), ends
        dropouts = stage.dropouts if with_dropout else None
        batches = micro_batch_tensors(
            parts, np.zeros(num_tasks), stage.device, stage.dtype, dropouts
        )
        losses = evaluate_replica(stage, batches, num_tasks, ends=ends, with_dropout=with_dropout)
        return losses, ends
