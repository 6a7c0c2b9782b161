"""A pass: the logprobs and gradients of data of several models, found together on all replicas."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from lobra.layout import sequences
from lobra.layout.order import StepOrder
from lobra.layout.sequences import Clipping, FloatArray, Labels, Rollout
from lobra.model.policy_loss import policy_losses
from lobra.planner.assignment import Assignment
from lobra.planner.packed.dispatch import dispatch_packed
from lobra.service.backlog import Job, Pass
from lobra.service.deployment import Deployment
from lobra.service.tally import PassRecord, Tally
from lobra.service.wire import Datum
from lobra.trainer.orders import order_of
from lobra.trainer.step_report import StepReport

Entries = Sequence[tuple[Job, Datum]]


class PassRunner:
    """Makes orders of passes and has them carried out."""

    def __init__(
        self,
        deployment: Deployment,
        carry_out: Callable[[StepOrder], StepReport | None],
        tally: Tally,
    ) -> None:
        self.deployment = deployment
        self.carry_out = carry_out
        self.tally = tally

    def run(self, work: Pass, slots: Mapping[str, int]) -> None:
        """Give every job of a pass the logprobs of its data, and its slot the gradients if wanted.

        Parameters
        ----------
        work
            The pass.
        slots
            The slot of every model by its name.
        """
        entries = sorted(work.data, key=lambda entry: slots[entry[0].model_id])
        rows = [
            _sequence(slots[job.model_id], place, datum, job.content.policy)
            for place, (job, datum) in enumerate(entries)
        ]
        assignment = dispatch_packed(
            [len(row.tokens) for row in rows], self.deployment.run.plan, self.deployment.costs
        )
        order = order_of(self.tally.passes, rows, (), assignment)
        start = time.perf_counter()
        report = self.carry_out(replace(order, accumulate=work.backward))
        assert report is not None, "data are sequences"
        self._count(entries, assignment, report, time.perf_counter() - start)
        places = [row.index for row in order.sequences]
        losses = dict(zip(places, report.token_losses, strict=True))
        for place, (job, _) in enumerate(entries):
            job.logprobs.append(-losses[place])  # sorting kept each job's data in order

    def _count(
        self, entries: Entries, assignment: Assignment, report: StepReport, pass_s: float
    ) -> None:
        tokens: Counter[str] = Counter()
        for job, datum in entries:
            tokens[job.tenant] += len(datum.tokens)
        predicted_s = assignment.step_time_s if self.deployment.has_times else None
        record = PassRecord(pass_s, predicted_s, report.busy_s, report.memory_bytes)
        self.tally.note_pass(record, tokens)


def _sequence(slot: int, place: int, datum: Datum, policy: Clipping | None) -> sequences.Sequence:
    """Return a datum as a slot's sequence; of a policy's loss its weights are advantages."""
    weights, rollout = datum.weights, None
    if policy is not None:
        assert datum.sampled is not None, "a policy's loss is of what was sampled"
        rollout = Rollout(datum.sampled, datum.weights, policy)
        weights = np.ones(len(datum.weights))
    targets = np.arange(1, len(datum.tokens) + 1, dtype=np.int32)
    labels = Labels(datum.labels, weights)
    return sequences.Sequence(slot, place, datum.tokens, targets, labels=labels, rollout=rollout)


def summed_loss(job: Job) -> float:
    """Return the loss of a job whose logprobs have been found."""
    policy = job.content.policy
    return sum(
        float(-(datum.weights * found).sum())
        if policy is None
        else _policy_loss(policy, datum, found)
        for datum, found in zip(job.data, job.logprobs, strict=True)
    )


def _policy_loss(policy: Clipping, datum: Datum, logprobs: FloatArray) -> float:
    assert datum.sampled is not None, "a policy's loss is of what was sampled"
    now, then, advantages = map(torch.from_numpy, (logprobs, datum.sampled, datum.weights))
    return float(policy_losses(now, then, advantages, policy.low, policy.high).sum())


def weight_of(job: Job) -> float:
    """Return the absolute weights that a job's loss is a sum of."""
    return sum(float(np.abs(datum.weights).sum()) for datum in job.data)
