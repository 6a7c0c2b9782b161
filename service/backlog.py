"""Requests that wait, in memory: which are ready, and which data of them share the next pass.

A model's requests are carried out in the order of their numbers, whenever they arrived. Those of
different models share what can be shared; of tokens every tenant gets its part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lobra.layout.sequences import FloatArray
from lobra.service.wire import Datum, LossRequest

AGE_LIMIT_S = 30.0  # what has waited longer goes first
MOST_DATA = 4096  # of a pass: each takes some time however short it is
LOSS_KINDS = ("forward_backward", "forward")


@dataclass(eq=False)
class Job:
    """A request to be carried out.

    Attributes
    ----------
    id, tenant, model_id, seq_id, kind
        Which request it is.
    content
        What is asked for: a `LossRequest`, else the fields of its body.
    arrived_at
        Seconds since the epoch.
    is_replay
        Whether its result is known already, and only its effect on the model is missing.
    is_suspect
        Whether it was being computed when the service ended: it is computed alone.
    logprobs
        Of a `LossRequest`: what has been found, datum by datum.
    """

    id: str
    tenant: str
    model_id: str
    seq_id: int
    kind: str
    content: Any
    arrived_at: float
    is_replay: bool = False
    is_suspect: bool = False
    logprobs: list[FloatArray] = field(default_factory=list)

    @property
    def data(self) -> tuple[Datum, ...]:
        """The data of a `LossRequest`."""
        assert isinstance(self.content, LossRequest)
        return self.content.data

    @property
    def is_over(self) -> bool:
        """Whether all logprobs of a `LossRequest` have been found."""
        return len(self.logprobs) == len(self.data)


@dataclass(frozen=True, eq=False)
class Pass:
    """Data that are computed together.

    Attributes
    ----------
    data
        Each with its job, those of a job in order.
    backward
        Whether gradients are wanted.
    """

    data: tuple[tuple[Job, Datum], ...]
    backward: bool


@dataclass
class _Queue:
    """A model's jobs by number, and the number that is next."""

    tenant: str
    next_seq: int
    jobs: dict[int, Job] = field(default_factory=dict)

    @property
    def head(self) -> Job | None:
        return self.jobs.get(self.next_seq)

    def losses(self, first: Job) -> Iterator[Job]:
        """Yield the ready jobs that may share a pass with a job."""
        seq_id = self.next_seq
        while (job := self.jobs.get(seq_id)) and _share(job, first):
            yield job
            seq_id += 1


class Backlog:
    """The jobs of the models that have a slot."""

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self._served: dict[str, float] = defaultdict(float)  # tokens of each tenant
        self._least_served = 0.0

    def open(self, model_id: str, tenant: str, next_seq: int) -> None:
        """Begin to take a model's jobs, from a number on."""
        self.queues[model_id] = _Queue(tenant, next_seq)

    def close(self, model_id: str) -> None:
        """Forget a model's jobs."""
        del self.queues[model_id]

    def add(self, job: Job) -> None:
        """Add a job; one that is known, or over, is left as it is."""
        queue = self.queues[job.model_id]
        if job.seq_id >= queue.next_seq:
            queue.jobs.setdefault(job.seq_id, job)

    def done(self, job: Job) -> None:
        """Go on after the first job of a model."""
        queue = self.queues[job.model_id]
        assert queue.next_seq == job.seq_id, "a model's jobs are done in order"
        del queue.jobs[job.seq_id]
        queue.next_seq += 1

    def heads(self) -> list[Job]:
        """Return the jobs that could be carried out now, one a model, the oldest first."""
        heads = [queue.head for queue in self.queues.values()]
        ready = [head for head in heads if head is not None]
        return sorted(ready, key=lambda job: job.arrived_at)

    def next_pass(self, max_tokens: int, now: float) -> Pass | None:
        """Return what is computed next, None if no loss is asked for.

        As long as there is room in ``max_tokens`` the tenant that got fewest tokens so far gets its
        oldest datum in, but data that have waited longer than `AGE_LIMIT_S` go first. Who comes
        back after a pause has no more claim than the others. A datum longer than all is alone.
        """
        heads = [head for head in self.heads() if head.kind in LOSS_KINDS]
        if not heads:
            return None
        first = self._by_claim(heads, now)[0]
        data = {model_id: _data(queue, first) for model_id, queue in self.queues.items()}
        following = {
            model_id: found for model_id, own in data.items() if (found := next(own, None))
        }
        active = {self.queues[model_id].tenant for model_id in following}
        for tenant in active:
            self._served[tenant] = max(self._served[tenant], self._least_served)
        chosen: list[tuple[Job, Datum]] = []
        room = max_tokens
        while following and len(chosen) < MOST_DATA:
            job = self._by_claim([job for job, _ in following.values()], now)[0]
            entry = following.pop(job.model_id)
            size = len(entry[1].tokens)
            if chosen and size > room:
                break
            chosen.append(entry)
            if found := next(data[job.model_id], None):
                following[job.model_id] = found
            room -= size
            self._served[job.tenant] += size
        self._least_served = min(self._served[tenant] for tenant in active)
        return Pass(tuple(chosen), backward=first.kind == "forward_backward")

    def _by_claim(self, jobs: list[Job], now: float) -> list[Job]:
        def claim(job: Job) -> tuple[bool, float, float]:
            is_old = now - job.arrived_at > AGE_LIMIT_S
            return not is_old, 0.0 if is_old else self._served[job.tenant], job.arrived_at

        return sorted(jobs, key=claim)


def _share(job: Job, other: Job) -> bool:
    """Return whether two jobs may be computed together."""
    if job.is_suspect or other.is_suspect:
        return job is other
    return job.kind == other.kind


def _data(queue: _Queue, first: Job) -> Iterator[tuple[Job, Datum]]:
    """Yield the data of a model, each with its job, that may share a pass with a job."""
    for job in queue.losses(first):
        for datum in job.data[len(job.logprobs) :]:
            yield job, datum
