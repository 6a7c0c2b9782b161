"""The service's coordinator: it makes orders of requests, and results of what the ranks report.

A model's state is never written down as such: it follows from its last snapshot and the requests
after it, which the ledger keeps. So after a restart, or when a model that had to give its slot to
another is asked for again, its snapshot is installed and those requests are carried out once more;
those that had a result keep it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import abc
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from lobra.layout.order import AdamSettings, SlotOrder, StepOrder, Update
from lobra.service import retention
from lobra.service.backlog import LOSS_KINDS, Backlog, Job, Pass
from lobra.service.changes import ModelChanges, as_json
from lobra.service.deployment import Deployment
from lobra.service.engine_link import EngineLink, RanksEnded
from lobra.service.ledger import Ledger, with_loss, without_body
from lobra.service.passes import PassRunner, summed_loss, weight_of
from lobra.service.seats import Seats, job_of
from lobra.service.tables import USER, RequestRow
from lobra.service.tally import Tally
from lobra.service.wire import loss_output
from lobra.trainer.step_report import StepReport

PASS_MICRO_BATCHES = 4  # full ones of every replica that a pass has room for
RETENTION_S = 10.0  # between two looks at what is to be deleted
WAIT_S = 1.0  # while models wait for a slot: one becomes free by time alone


class Coordinator:
    """The thread that carries requests out; any thread may `submit`, `stop` and `lose_ranks`.

    Attributes
    ----------
    deployment
        Where what is carried out runs; after ranks are lost, another of the same model may take
        its place.
    missing_ranks
        Why there are no ranks that would carry anything out; None: they are there.
    """

    def __init__(
        self, deployment: Deployment, ledger: Ledger, finished: Callable[[str], None]
    ) -> None:
        """Go on with what the ledger has; call ``finished`` with the name of every request."""
        self.deployment = deployment
        self.ledger = ledger
        self.finished = finished
        self.tally = Tally()
        self._changed = threading.Condition()
        self.link: EngineLink | None = None
        self.missing_ranks: str | None = "they load the model"
        self._forget()
        self._looked_at = -math.inf  # at what is to be deleted (monotonic seconds)
        self._stop = False

    # -- from other threads ---------------------------------------------------------------------

    def submit(self, row: RequestRow, content: Any) -> None:
        """Have a request carried out that is in the ledger."""
        with self._changed:
            self._submitted.append(job_of(row, content))
            self._changed.notify()

    def stop(self) -> None:
        """End after the order in progress."""
        with self._changed:
            self._stop = True
            self._changed.notify()

    def lose_ranks(self, why: str) -> None:
        """Wait for other ranks: those there were have ended."""
        with self._changed:
            self.missing_ranks = why
            self._changed.notify()

    # -- the thread -----------------------------------------------------------------------------

    def run(self, link: EngineLink) -> None:
        """Carry requests out until `stop`, by ranks that have no model yet.

        Raises
        ------
        RanksEnded
            They have ended; what they had not done is done by the next ones.
        """
        self.link, self.missing_ranks = link, None
        self._forget()
        for model_id in self.ledger.unfinished_models():
            self._want(model_id)
        while not self._stop:
            if self.missing_ranks is not None:
                raise RanksEnded
            if time.monotonic() - self._looked_at > RETENTION_S:
                self._delete()
            self._take_submitted()
            self.seats.seat_wanted()
            if not self._carry_out_next():
                with self._changed:
                    if not (self._submitted or self._stop or self.missing_ranks):
                        self._changed.wait(WAIT_S if self.seats.wanted else RETENTION_S)
        self.seats.take_snapshots()
        self._order(StepOrder(self.tally.updates, stop=True))

    def _forget(self) -> None:
        """Forget what ranks had, and what was to be done: the ledger knows it."""
        with self._changed:
            self._submitted: list[Job] = []
        self.backlog = Backlog()
        self.passes = PassRunner(self.deployment, self._order, self.tally)
        self.seats = Seats(
            self.deployment, self.ledger, self.backlog, self._change_slot, self._give_up
        )
        self.changes = ModelChanges(self.deployment, self.ledger, self.seats, self._finish)

    def _take_submitted(self) -> None:
        with self._changed:
            jobs, self._submitted = self._submitted, []
        for job in jobs:
            if seat := self.seats.taken.get(job.model_id):
                seat.used_at = time.monotonic()
                self.backlog.add(job)
            else:
                self._want(job.model_id)

    def _want(self, model_id: str) -> None:
        """Have a model seated that has requests, which get no result if it is closed."""
        model = self.ledger.model(model_id)
        if model is not None and model.is_open:
            self.seats.want(model_id)
        else:
            self.changes.close(model_id)

    def _delete(self) -> None:
        """Delete what has had its time, and all of tenants for whom that is asked for."""
        kept, now = self.deployment.state_folder, time.time()
        self.ledger.forget_expired(now)
        self.ledger.forget_results(now)
        self.ledger.forget_sessions(now - retention.SESSION_DAYS * retention.DAY_S)
        for model_id in retention.abandoned_models(self.ledger, now):
            self._close(model_id)
        for tenant in retention.to_be_deleted(self.ledger):
            for model in self.ledger.models_of(tenant):
                self._close(model.id)
            retention.delete_data(kept, self.ledger, tenant)
        retention.remove_unnamed(kept, self.ledger)
        self._looked_at = time.monotonic()

    def _close(self, model_id: str) -> None:
        if model_id in self.seats.taken:
            self.seats.leave(model_id)
        self.changes.close(model_id)

    def _carry_out_next(self) -> bool:
        """Carry out what is ready; return whether anything was.

        Of every model one request of another kind than losses, updates together, then a pass: so
        whoever has many of the former holds up nobody who waits for the latter.
        """
        others = [job for job in self.backlog.heads() if job.kind not in LOSS_KINDS]
        if updates := [job for job in others if job.kind == "optim_step"]:
            self._update(updates)
        for job in others:
            if job.kind != "optim_step":
                self.changes.carry_out(job)
        if found := self.backlog.next_pass(self._pass_tokens, time.time()):
            self._compute(found)
        return bool(others or found)

    @property
    def _pass_tokens(self) -> int:
        groups = self.deployment.run.plan.groups
        return PASS_MICRO_BATCHES * sum(group.replicas * group.max_tokens for group in groups)

    def _order(self, order: StepOrder) -> StepReport | None:
        assert self.link is not None
        return self.link.carry_out(order)

    def _change_slot(self, order: SlotOrder) -> None:
        self._order(StepOrder(self.tally.updates, slots=(order,)))

    # -- losses and updates ---------------------------------------------------------------------

    def _compute(self, work: Pass) -> None:
        """Find the logprobs of a pass, and its gradients if wanted."""
        jobs = sorted({job for job, _ in work.data}, key=lambda job: job.seq_id)
        if fresh := [job.id for job in jobs if not (job.is_replay or job.logprobs)]:
            self.ledger.note_try(fresh)
        for job in jobs:
            self.seats.taken[job.model_id].has_gradient |= work.backward
        self.passes.run(work, self.seats.slots)
        for job in jobs:
            if not job.is_over:
                continue
            loss, also = summed_loss(job), []
            if work.backward:
                seat = self.seats.taken[job.model_id]
                seat.loss += loss
                seat.weight += weight_of(job)
            else:
                also.append(without_body(job.id))  # it changed nothing
            self._finish(job, loss_output(job.logprobs, loss), also=also)
            self.seats.snapshot_if_due(job.model_id)

    def _update(self, jobs: list[Job]) -> None:
        """Take an optimiser step of every model that asks for one."""
        slots = self.seats.slots
        updates = [_update_of(slots[job.model_id], job.content) for job in jobs]
        report = self._order(StepOrder(self.tally.updates, updates=tuple(updates)))
        assert report is not None
        for job in jobs:
            seat = self.seats.taken[job.model_id]
            loss, weight = seat.loss, seat.weight
            seat.loss, seat.weight, seat.has_gradient = 0.0, 0.0, False
            if not report.is_finite(seat.slot):
                self._finish(job, error="the gradient is not finite: it was dropped, no update")
                continue
            if (why := report.failed.get(seat.slot)) is not None:
                self._finish(job, error=f"the update failed: {why}: the weights are as before")
                continue
            seat.updates += 1
            self.tally.note_update()
            mean = loss / weight if weight else math.nan
            noted = [with_loss(job.model_id, seat.updates, mean)] if math.isfinite(mean) else []
            metrics = {"grad_norm": report.grad_norms[seat.slot]}
            self._finish(job, as_json(metrics=metrics), also=noted)
            self.seats.snapshot_if_due(job.model_id)

    # -- results --------------------------------------------------------------------------------

    def _finish(
        self,
        job: Job,
        result: bytes | None = None,
        error: str | None = None,
        also: abc.Iterable[sa.UpdateBase] = (),
        category: str = USER,
    ) -> None:
        """Note what became of a job, and with it, as one, what else is to be noted."""
        self.backlog.done(job)
        if not job.is_replay:
            self.seats.taken[job.model_id].has_progressed = True
            self.ledger.finish(job.id, result, error, also, category)
            self.finished(job.id)

    def _give_up(self, row: RequestRow, error: str) -> None:
        """Note why a request gets no result."""
        self.ledger.finish(row.id, None, error)
        self.finished(row.id)


def _update_of(slot: int, content: dict[str, Any]) -> Update:
    settings: dict[str, float] = content["adam_params"]
    adam = AdamSettings(
        settings["beta1"], settings["beta2"], settings["eps"], settings["weight_decay"]
    )
    return Update(slot, settings["learning_rate"], settings["grad_clip_norm"], adam)
