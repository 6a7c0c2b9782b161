"""A pass: the logprobs and gradients of data of several models, found together on all replicas."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lobra.layout import sequences
from lobra.layout.order import StepOrder
from lobra.layout.sequences import FloatArray, Labels
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

        What counts for a policy's loss follows from its logprobs: these are found first.

        Parameters
        ----------
        work
            The pass.
        slots
            The slot of every model by its name.
        """
        entries = sorted(work.data, key=lambda entry: slots[entry[0].model_id])
        weights = [datum.weights for _, datum in entries]
        if work.backward:
            places = [n for n, (job, _) in enumerate(entries) if job.content.policy is not None]
            first = self._logprobs(
                [entries[n] for n in places], [weights[n] for n in places], slots
            )
            for n, logprobs in zip(places, first, strict=True):
                job, datum = entries[n]
                weights[n] = job.content.policy.weights(logprobs, datum.sampled, datum.weights)
        found = self._logprobs(entries, weights, slots, accumulate=work.backward)
        for (job, _), logprobs in zip(entries, found, strict=True):
            job.logprobs.append(logprobs)  # sorting kept each job's data in order

    def _logprobs(
        self,
        entries: Entries,
        weights: Sequence[FloatArray],
        slots: Mapping[str, int],
        accumulate: bool = False,
    ) -> list[FloatArray]:
        """Return the logprobs of data, sorted by slot; gradients for their weights if wanted."""
        if not entries:
            return []
        rows = [
            sequences.Sequence(
                slots[job.model_id],
                place,
                datum.tokens,
                np.arange(1, len(datum.tokens) + 1, dtype=np.int32),
                labels=Labels(datum.labels, own),
            )
            for place, ((job, datum), own) in enumerate(zip(entries, weights, strict=True))
        ]
        lengths = [len(row.tokens) for row in rows]
        assignment = dispatch_packed(lengths, self.deployment.run.plan, self.deployment.costs)
        order = replace(order_of(self.tally.passes, rows, (), assignment), accumulate=accumulate)
        start = time.perf_counter()
        report = self.carry_out(order)
        assert report is not None, "data are sequences"
        self._count(entries, assignment, report, time.perf_counter() - start)
        places = [row.index for row in order.sequences]
        losses = dict(zip(places, report.token_losses, strict=True))
        return [-losses[place] for place in range(len(entries))]

    def _count(
        self, entries: Entries, assignment: Assignment, report: StepReport, pass_s: float
    ) -> None:
        tokens: Counter[str] = Counter()
        for job, datum in entries:
            tokens[job.tenant] += len(datum.tokens)
        predicted_s = assignment.step_time_s if self.deployment.has_times else None
        record = PassRecord(pass_s, predicted_s, report.busy_s, report.memory_bytes)
        self.tally.note_pass(record, tokens)


def summed_loss(job: Job) -> float:
    """Return the loss of a job whose logprobs have been found."""
    policy = job.content.policy
    return sum(
        float(-(datum.weights * found).sum())
        if policy is None
        else policy.value(found, datum.sampled, datum.weights)
        for datum, found in zip(job.data, job.logprobs, strict=True)
    )


def weight_of(job: Job) -> float:
    """Return the absolute weights that a job's loss is a sum of."""
    return sum(float(np.abs(datum.weights).sum()) for datum in job.data)
