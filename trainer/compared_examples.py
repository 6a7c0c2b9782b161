"""The examples of an order on one rank: what they are compared with, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lobra.layout.order import StepOrder
from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.objectives import OUTCOMES
from lobra.model.precision import kept_dtype
from lobra.model.stage import Stage
from lobra.tasks.objectives import Objective
from lobra.trainer.comparison import Comparison, example_weights
from lobra.trainer.contrast import ContrastPass
from lobra.trainer.control import Control
from lobra.trainer.step_report import StepReport


class ComparedExamples:
    """The passes that an order's examples need before its own. All methods are collective.

    Attributes
    ----------
    outcomes
        [tasks, `OUTCOMES`] where the order's own pass adds what becomes of its examples.
    """

    def __init__(
        self,
        stage: Stage,
        control: Control,
        order: StepOrder,
        objectives: Mapping[int, Objective],
        num_tasks: int,
    ) -> None:
        self.stage = stage
        self.control = control
        self.order = order
        self.objectives = objectives
        dtype = kept_dtype(stage.dtype)
        self.outcomes = torch.zeros(num_tasks, len(OUTCOMES), dtype=dtype, device=stage.device)
        # Of every task with examples its divergence from the base model, 0 where its objective has
        # none, or its contrast and what that counts for.
        self._found: dict[int, dict[str, float]] = {}

    def compared(self, batches: Sequence[MicroBatchTensors]) -> Sequence[MicroBatchTensors]:
        """Return this replica's micro-batches with what their answers are compared with."""
        order, place, num_tasks = self.order, self.stage.groups.place, len(self.outcomes)
        own = order.replicas[place.replica]
        contrasting = ContrastPass(self.stage, self.control, order, self.objectives, num_tasks)
        batches = contrasting.pulled(own, batches)
        weights = example_weights(order, self.objectives)
        comparison = Comparison(self.stage, own, weights, num_tasks)
        references = comparison.references()
        gained = comparison.gains(references)
        if not place.owns_loss:
            gained = torch.zeros_like(gained)  # its TP peers computed the same
        if any(sequence.is_compared for sequence in order.sequences):
            self.control.sum_everywhere(gained)
        divergence = comparison.divergence(gained)
        self._found = {task: {"kl": float(divergence[task])} for task in order.num_examples}
        for task, contrast in contrasting.contrasts.items():
            self._found[task] = {"contrast": contrast.loss, "contrast_weight": contrast.weight}
        return comparison.compared(batches, references, divergence)

    def reported(self, report: StepReport) -> StepReport:
        """Return the order's report with what became of its examples, on every rank."""
        if not self.order.num_examples:
            return report
        # Its TP peers computed the same.
        whole = self.outcomes.cpu().double() * self.stage.groups.place.owns_loss
        self.control.sum_everywhere(whole)
        found = {
            task: {**dict(zip(OUTCOMES, whole[task].tolist(), strict=True)), **self._found[task]}
            for task in self.order.num_examples
        }
        for own in found.values():
            own["loss"] += own.get("contrast", 0.0) * own.get("contrast_weight", 0.0)
        losses = {**report.losses, **{task: own["loss"] for task, own in found.items()}}
        return replace(report, losses=losses, outcomes=found)
