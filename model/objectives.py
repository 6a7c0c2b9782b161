"""Losses of examples: what is learned from several answers' log-probabilities at once.

Examples are of two sequences. Their logarithmic probabilities, summed over an answer's tokens, are
all that a loss depends on, beside the mean loss of wanted answers' tokens. Of contrasted pairs that
is all; what is between them is in `model.contrast`.

Shape suffixes: P tokens to be predicted, N sequences of a micro-batch, n of them those of one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lobra.layout.sequences import Sequence as TokenSequence
from lobra.tasks.objectives import CIT, PAIRED, Objective

#: What is summed over a step's examples: the loss, as it is weighted, and of the answers that are
#: wanted and those that are not the rewards, log-probabilities and numbers; then the pairs of which
#: the chosen answer has the higher reward.
OUTCOMES = (
    "loss",
    "rewards_chosen",
    "rewards_rejected",
    "logps_chosen",
    "logps_rejected",
    "num_chosen",
    "num_rejected",
    "num_right",
)


@dataclass(frozen=True)
class ExampleWeights:
    """What a task's examples count for in a step.

    Attributes
    ----------
    objective
        The task's.
    of_example
        1 / the step's examples of the task.
    of_token
        What the loss of each target of a wanted answer's sequence counts for beside.
    """

    objective: Objective
    of_example: float
    of_token: float


@dataclass(frozen=True, eq=False)
class TaskExamples:
    """The examples that a micro-batch has of one task.

    `sequences` are their places in it. `signs_n`: 1 of a wanted answer, -1 of one that is not.
    """

    task: int
    weights: ExampleWeights
    sequences: slice
    signs_n: Tensor


@dataclass(frozen=True, eq=False)
class Examples:
    """The examples of a micro-batch.

    Attributes
    ----------
    sequence_P
        int64: the sequence that each target is of.
    answer_P
        1 where a target is of the answer, 0 where it is of its prompt.
    answers_N
        How many targets are of a sequence's answer; at least 1.
    tasks
        By task.
    reference_N
        The base model's log-probability of every answer, where a task needs it.
    divergence
        [tasks] KTO's estimate of how far a task's policy is from the base model, at least 0.
    """

    sequence_P: Tensor
    answer_P: Tensor
    answers_N: Tensor
    tasks: tuple[TaskExamples, ...]
    reference_N: Tensor | None = None
    divergence: Tensor | None = None

    def answers(self, losses_P: Tensor) -> Tensor:
        """Return the log-probability [N] of every sequence's answer."""
        return self._summed(-losses_P * self.answer_P)

    def loss(self, losses_P: Tensor) -> Tensor:
        """Return what the micro-batch adds to the losses of all tasks of examples together."""
        parts = [one.losses.sum() for one in self._compared(losses_P)]
        return torch.stack(parts).sum() if parts else losses_P.new_zeros(())

    def outcomes(self, losses_P: Tensor, num_tasks: int) -> Tensor:
        """Return what the micro-batch adds to `OUTCOMES`: [tasks, outcomes]."""
        found = losses_P.new_zeros(num_tasks, len(OUTCOMES))
        for one in self._compared(losses_P):
            signs_n, rewards_n = one.of_task.signs_n, one.rewards_n
            wanted_n, unwanted_n = signs_n.clamp(min=0), (-signs_n).clamp(min=0)
            right = losses_P.new_zeros(())
            if one.of_task.weights.objective.kind in PAIRED:
                right = (rewards_n[0::2] > rewards_n[1::2]).sum()
            found[one.of_task.task] = torch.stack(
                [
                    one.losses.sum(),
                    rewards_n @ wanted_n, rewards_n @ unwanted_n,
                    one.answers_n @ wanted_n, one.answers_n @ unwanted_n,
                    wanted_n.sum(), unwanted_n.sum(),
                    right.to(losses_P.dtype),
                ]
            )  # fmt: skip
        return found

    def _summed(self, values_P: Tensor) -> Tensor:
        zeros_N = torch.zeros_like(self.answers_N)
        return zeros_N.index_add(0, self.sequence_P, values_P)

    def _compared(self, losses_P: Tensor) -> list[_Compared]:
        answers_N, targets_N = self.answers(losses_P), self._summed(losses_P)
        found = []
        for own in self.tasks:
            part, weights = own.sequences, own.weights
            answers_n = answers_N[part]
            reference_n = None
            if weights.objective.has_reference and self.reference_N is not None:
                reference_n = self.reference_N[part]
            divergence = self.divergence[own.task] if self.divergence is not None else None
            if weights.objective.kind == "orpo":
                answers_n = answers_n / self.answers_N[part]
            losses, rewards_n = example_losses(
                weights.objective, answers_n, own.signs_n, reference_n, divergence
            )
            losses = losses * weights.of_example
            if weights.of_token:
                wanted_n = targets_N[part] * own.signs_n.clamp(min=0)
                losses = losses + weights.of_token * (wanted_n[0::2] + wanted_n[1::2])
            found.append(_Compared(own, losses, answers_n.detach(), rewards_n.detach()))
        return found


@dataclass(frozen=True, eq=False)
class _Compared:
    """Of a task's examples the weighted losses, and the answers' log-probabilities and rewards."""

    of_task: TaskExamples
    losses: Tensor
    answers_n: Tensor
    rewards_n: Tensor


def example_losses(
    objective: Objective,
    answers_n: Tensor,
    signs_n: Tensor,
    reference_n: Tensor | None = None,
    divergence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (every example's loss, every answer's reward [n]).

    Parameters
    ----------
    objective
        Which loss.
    answers_n
        The answers' log-probabilities; of ORPO their means over the answers' tokens. Of pairs the
        chosen and the rejected one alternate.
    signs_n
        1 of a wanted answer, -1 of one that is not.
    reference_n
        The base model's, for objectives with a reference.
    divergence
        KTO's, at least 0.
    """
    if objective.kind == CIT:
        return torch.zeros_like(answers_n[0::2]), torch.zeros_like(answers_n)
    gains_n = answers_n if reference_n is None else answers_n - reference_n
    rewards_n = objective.beta * gains_n
    if objective.kind == "kto":  # equation 7 of the paper
        assert divergence is not None
        weights_n = objective.desirable_weight * signs_n.clamp(min=0)
        weights_n = weights_n + objective.undesirable_weight * (-signs_n).clamp(min=0)
        utilities_n = torch.sigmoid(signs_n * (rewards_n - objective.beta * divergence))
        return weights_n * (1 - utilities_n), rewards_n
    margins = rewards_n[0::2] - rewards_n[1::2]
    if objective.kind == "orpo":  # equations 4 and 7 of the paper
        chosen, rejected = answers_n[0::2], answers_n[1::2]
        log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
        return -objective.beta * logsigmoid(log_odds), rewards_n
    return -logsigmoid(margins), rewards_n


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) of negative numbers, exact near 0 and far from it."""
    near = torch.log(-torch.expm1(x.clamp(min=-1.0)))
    far = torch.log1p(-torch.exp(x.clamp(max=-0.5)))
    return torch.where(x > -0.6931471805599453, near, far)  # -log 2: there both are as exact


def task_examples(
    sequences: Sequence[TokenSequence], weights: Mapping[int, ExampleWeights], signs_N: Tensor
) -> tuple[TaskExamples, ...]:
    """Return the examples that a micro-batch has of each task; ``signs_N`` are its sequences'."""
    found = []
    start = 0
    for number, own in groupby(sequences, lambda sequence: sequence.task):
        part = slice(start, start + sum(1 for _ in own))
        start = part.stop
        if number in weights:
            found.append(TaskExamples(number, weights[number], part, signs_N[part]))
    return tuple(found)
