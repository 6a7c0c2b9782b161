"""The service's coordinator: it makes orders of requests, and results of what the ranks report.

A model's state is never written down as such: it follows from its last snapshot and the requests
after it, which the ledger keeps. So after a restart, or when a model that had to give its slot to
another is asked for again, its snapshot is installed and those requests are carried out once more;
those that had a result keep it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lobra.common.files import remove_folder
from lobra.layout.order import AdamSettings, SlotOrder, StepOrder, Update
from lobra.service.backlog import LOSS_KINDS, Backlog, Job, Pass
from lobra.service.deployment import PATH_PREFIX, Deployment
from lobra.service.engine_link import EngineLink
from lobra.service.ledger import (
    CheckpointRow,
    Ledger,
    ModelRow,
    RequestRow,
    SamplerRow,
    checkpoints,
    samplers,
    with_row,
    with_snapshot,
)
from lobra.service.passes import PassRunner, mean_loss, summed_loss
from lobra.service.tally import Tally
from lobra.service.wire import loss_output
from lobra.trainer.step_report import StepReport

log = logging.getLogger(__name__)

ALPHA = 32.0  # of every adapter: the protocol has no field for it
PASS_MICRO_BATCHES = 4  # full ones of every replica that a pass has room for
MOST_TRIES = 3  # of a request during which the service ended
SNAPSHOT_UPDATES = 20  # updates after which a model's snapshot is renewed
IDLE_S = 10.0  # a model in the middle of a step keeps its slot so long
SAMPLING_LIFE_S = 86400.0  # of weights that were saved without a name, only to be sampled from
WEIGHTS, SAMPLER_WEIGHTS = "weights", "sampler_weights"


def sampler_name(session_id: str, seq_id: int) -> str:
    """Return the name of a session's sampling session."""
    return f"{session_id}:sample:{seq_id}"


class RequestError(Exception):
    """Why a request that was accepted has no result; the tenant is told."""


@dataclass
class Seat:
    """A model that has a slot.

    Attributes
    ----------
    slot
        The slot's number.
    updates, snapshot_updates
        Updates it has had, now and at its last snapshot.
    has_gradient
        Whether it is in the middle of a step.
    used_at
        When it was last asked for (monotonic seconds).
    """

    slot: int
    updates: int
    snapshot_updates: int
    has_gradient: bool = False
    used_at: float = 0.0


class Coordinator:
    """The thread that carries requests out. `submit` and `stop` may be called from any thread."""

    def __init__(
        self, deployment: Deployment, ledger: Ledger, finished: Callable[[str], None]
    ) -> None:
        """Go on with what the ledger has; call ``finished`` with the name of every request."""
        self.deployment = deployment
        self.ledger = ledger
        self.finished = finished
        self.backlog = Backlog()
        self.seats: dict[str, Seat] = {}
        self.wanted = dict.fromkeys(ledger.unfinished_models())  # models without a slot, in order
        self.tally = Tally()
        self.passes = PassRunner(deployment, self._order, self.tally)
        self.link: EngineLink | None = None
        self._changed = threading.Condition()
        self._submitted: list[Job] = []
        self._stop = False

    # -- from other threads ---------------------------------------------------------------------

    def submit(self, row: RequestRow, content: Any) -> None:
        """Have a request carried out that is in the ledger."""
        with self._changed:
            self._submitted.append(_job(row, content))
            self._changed.notify()

    def stop(self) -> None:
        """End after the order in progress."""
        with self._changed:
            self._stop = True
            self._changed.notify()

    # -- the thread -----------------------------------------------------------------------------

    def run(self, link: EngineLink) -> None:
        """Carry requests out until `stop`."""
        self.link = link
        self._drop_expired()
        while not self._stop:
            self._take_submitted()
            self._seat_wanted()
            if not self._carry_out_next():
                with self._changed:
                    if not (self._submitted or self._stop):
                        # While models wait for a slot, one becomes free by time alone.
                        self._changed.wait(1.0 if self.wanted else None)
        for model_id, seat in self.seats.items():
            if not seat.has_gradient and seat.updates > seat.snapshot_updates:
                self._take_snapshot(model_id)
        self._order(StepOrder(self.tally.updates, stop=True))

    def _take_submitted(self) -> None:
        with self._changed:
            jobs, self._submitted = self._submitted, []
        for job in jobs:
            if job.model_id in self.seats:
                self.seats[job.model_id].used_at = time.monotonic()
                self.backlog.add(job)
            else:  # when it gets a slot, all its requests come from the ledger
                self.wanted[job.model_id] = None

    def _carry_out_next(self) -> bool:
        """Carry out what is ready, updates and slots before losses; return whether anything was."""
        heads = [job for job in self.backlog.heads() if job.kind not in LOSS_KINDS]
        if updates := [job for job in heads if job.kind == "optim_step"]:
            self._update(updates)
        elif heads:
            self._change_model(heads[0])
        elif found := self.backlog.next_pass(self._pass_tokens, time.time()):
            self._compute(found)
        else:
            return False
        return True

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
            self.seats[job.model_id].has_gradient |= work.backward
        self.passes.run(work, {model_id: seat.slot for model_id, seat in self.seats.items()})
        for job in jobs:
            if job.is_over:
                loss = summed_loss(job)
                self.tally.losses[job.model_id].append(mean_loss(job, loss))
                self._finish(job, loss_output(job.logprobs, loss))

    def _update(self, jobs: list[Job]) -> None:
        """Take an optimiser step of every model that asks for one."""
        updates = [_update_of(self.seats[job.model_id].slot, job.content) for job in jobs]
        report = self._order(StepOrder(self.tally.updates, updates=tuple(updates)))
        assert report is not None
        for job in jobs:
            seat = self.seats[job.model_id]
            seat.has_gradient = False
            if not report.is_finite(seat.slot):
                self._finish(job, error="the gradient is not finite: it was dropped, no update")
                continue
            if (why := report.failed.get(seat.slot)) is not None:
                self._finish(job, error=f"the update failed: {why}: the weights are as before")
                continue
            seat.updates += 1
            self.tally.updates += 1
            self._finish(job, _json(metrics={"grad_norm": report.grad_norms[seat.slot]}))
            if seat.updates - seat.snapshot_updates >= SNAPSHOT_UPDATES:
                self._take_snapshot(job.model_id)

    # -- models ---------------------------------------------------------------------------------

    def _change_model(self, job: Job) -> None:
        """Carry out a request that is neither of losses nor of an update."""
        change = getattr(self, f"_{job.kind}")
        try:
            if job.is_replay and job.kind.startswith("save"):
                self._finish(job)
            else:
                change(job)
        except RequestError as error:
            self._finish(job, error=str(error))
            if not job.seq_id:  # there is no model then
                del self.seats[job.model_id]
                self.backlog.close(job.model_id)
                self._close(job.model_id)

    def _nothing(self, job: Job) -> None:
        """Go on after a request that was given up."""
        self._finish(job)

    def _create_model(self, job: Job) -> None:
        self._install(job.model_id)
        self._finish(job, _json(type="create_model", model_id=job.model_id))

    def _load_weights(self, job: Job) -> None:
        """Give a model the weights of a checkpoint, and its moments if asked for."""
        path, with_moments = job.content["path"], job.content["optimizer"]
        found = self.ledger.checkpoint(path)
        if found is None or found.tenant != job.tenant:
            raise RequestError(f"{path}: there is no such checkpoint")
        if with_moments and found.kind != WEIGHTS:
            raise RequestError(f"{path}: has no optimizer state; only what save_state wrote has")
        own, source = self.ledger.model(job.model_id), self.ledger.model(found.model_id)
        assert own is not None and source is not None, "models are never forgotten"
        if (own.rank, own.target_modules) != (source.rank, source.target_modules):
            raise RequestError(f"{path}: is of another rank or of other modules than this model")
        seat = self.seats[job.model_id]
        if job.seq_id:
            self._change_slot(SlotOrder("remove", seat.slot))
        seat.updates = found.updates if with_moments else 0
        seat.has_gradient = False
        self._install(job.model_id, self.deployment.folder_of(path), with_moments)
        # Whatever becomes of the checkpoint, the model does not depend on it.
        snapshot = self._snapshot(job.model_id, job.seq_id)
        answer = _json(type="load_weights", path=path, model_id=job.model_id)
        self._finish(job, answer, also=snapshot)
        if own.snapshot:
            remove_folder(Path(own.snapshot))

    def _unload_model(self, job: Job) -> None:
        self.ledger.close_model(job.model_id)  # first: who is answered may make another
        self._finish(job, _json(type="unload_model", model_id=job.model_id))
        self._leave(job.model_id)
        self._close(job.model_id)

    def _close(self, model_id: str) -> None:
        """Train a model no more; requests that still wait get no result."""
        self.ledger.close_model(model_id)
        model = self.ledger.model(model_id)
        if model is not None and model.snapshot and Path(model.snapshot).is_dir():
            remove_folder(Path(model.snapshot))
        for row in self.ledger.requests_after(model_id, -1):
            if row.finished_at is None:
                self.ledger.finish(row.id, None, f"model {model_id} is closed")
                self.finished(row.id)

    def _save_weights(self, job: Job) -> None:
        self._save(job, WEIGHTS)

    def _save_weights_for_sampler(self, job: Job) -> None:
        self._save(job, SAMPLER_WEIGHTS)

    def _save(self, job: Job, kind: str) -> None:
        content, seat = job.content, self.seats[job.model_id]
        name, life_s = content["path"], content["ttl_seconds"]
        if name is None:
            name, life_s = f"for-sampling-{job.seq_id}", life_s or SAMPLING_LIFE_S
        path = f"{PATH_PREFIX}{job.model_id}/{kind}/{name}"
        is_new = self.ledger.checkpoint(path) is None
        if not is_new and kind == WEIGHTS and not content["overwrite"]:
            raise RequestError(f"{path}: there is one already; save it with overwrite=True")
        folder = self.deployment.folder_of(path)
        self._write(job.model_id, folder, kind == WEIGHTS)
        now = time.time()
        row = CheckpointRow(
            path,
            job.tenant,
            job.model_id,
            kind,
            name,
            seat.updates,
            sum(file.stat().st_size for file in folder.iterdir()),
            content["user_metadata"] or {},
            now,
            None if life_s is None else now + life_s,
        )
        noted = [with_row(checkpoints, row)]
        answer = {"path": path}
        if content["path"] is None:
            session_id = job.model_id.partition(":")[0]
            sampler = sampler_name(session_id, content["sampling_session_seq_id"])
            noted.append(with_row(samplers, SamplerRow(sampler, job.tenant, path)))
            answer = {"sampling_session_id": sampler}
        self._finish(job, _json(type=job.kind, **answer), also=noted)
        self._drop_expired()

    def _drop_expired(self) -> None:
        for row in self.ledger.expired(time.time()):
            self.deployment.drop_checkpoint(self.ledger, row)

    def _finish(
        self,
        job: Job,
        result: bytes | None = None,
        error: str | None = None,
        also: abc.Iterable[sa.UpdateBase] = (),
    ) -> None:
        """Note what became of a job, and with it, as one, what else is to be noted."""
        self.backlog.done(job)
        if not job.is_replay:
            self.ledger.finish(job.id, result, error, also)
            self.finished(job.id)

    # -- slots ----------------------------------------------------------------------------------

    def _seat_wanted(self) -> None:
        """Give slots to models that are asked for, as far as there are any."""
        for model_id in list(self.wanted):
            slot = self._free_slot()
            if slot is None:
                return
            del self.wanted[model_id]
            model = self.ledger.model(model_id)
            if model is not None and model.is_open:
                self._seat(model, slot)
            else:
                self._close(model_id)

    def _free_slot(self) -> int | None:
        """Return a slot that no model has, or that a model nobody asks for had to give away.

        It is that of the model that has rested longest. One in the middle of a step keeps its slot
        for a while: its gradient would have to be computed again.
        """
        taken = {seat.slot for seat in self.seats.values()}
        free = set(range(self.deployment.max_slots)) - taken
        if free:
            return min(free)
        busy = {job.model_id for job in self.backlog.heads()}
        now = time.monotonic()
        idle = [
            (seat.used_at, model_id)
            for model_id, seat in self.seats.items()
            if model_id not in busy and (not seat.has_gradient or now - seat.used_at > IDLE_S)
        ]
        if not idle:
            return None
        _, model_id = min(idle)
        seat = self.seats[model_id]
        if not seat.has_gradient and seat.updates > seat.snapshot_updates:
            self._take_snapshot(model_id)
        self._leave(model_id)
        return seat.slot

    def _seat(self, model: ModelRow, slot: int) -> None:
        """Give a model a slot; its requests since its snapshot are carried out, again or at last.

        Of a model without a snapshot the first request installs what it starts from.
        """
        updates = model.snapshot_updates
        self.seats[model.id] = Seat(slot, updates, updates, used_at=time.monotonic())
        self.backlog.open(model.id, model.tenant, model.snapshot_seq + 1)
        if model.snapshot:
            self._install(model.id, Path(model.snapshot), with_moments=True)
        for row in self.ledger.requests_after(model.id, model.snapshot_seq):
            body = row.body
            assert body is not None, "bodies are kept until a snapshot has their effect"
            if row.kind not in LOSS_KINDS:
                self.backlog.add(_job(row, json.loads(body)))
                continue
            if row.finished_at is None and row.tries >= MOST_TRIES:
                error = f"the service ended {row.tries} times while it computed this; send less"
                self.ledger.finish(row.id, None, error)
                self.finished(row.id)
                row = replace(row, finished_at=time.time(), error=error)
            job = _job(row, self.deployment.read_loss_request(body))
            self.backlog.add(job if row.error is None else replace(job, kind="nothing"))

    def _leave(self, model_id: str) -> None:
        """Take a model's slot away."""
        seat = self.seats.pop(model_id)
        self.backlog.close(model_id)
        self._change_slot(SlotOrder("remove", seat.slot))

    def _install(
        self, model_id: str, folder: Path | None = None, with_moments: bool = False
    ) -> None:
        model = self.ledger.model(model_id)
        assert model is not None
        seat = self.seats[model_id]
        adapter = {
            "name": "adapter",  # of which the first values follow, and of the seed
            "rank": model.rank,
            "alpha": ALPHA,
            "target_modules": model.target_modules,
            "seed": model.seed,
        }
        order = SlotOrder(
            "install", seat.slot, adapter, str(folder or ""), with_moments, seat.updates
        )
        self._change_slot(order)

    def _write(self, model_id: str, folder: Path, with_moments: bool) -> None:
        slot = self.seats[model_id].slot
        order = SlotOrder("save", slot, folder=str(folder), moments=with_moments)
        self._change_slot(order)

    def _take_snapshot(self, model_id: str) -> None:
        """Write a model down as it is after the last request that was carried out."""
        model = self.ledger.model(model_id)
        assert model is not None
        seq_id = self.backlog.queues[model_id].next_seq - 1
        self.ledger.execute(*self._snapshot(model_id, seq_id))
        if model.snapshot and seq_id != model.snapshot_seq:
            remove_folder(Path(model.snapshot))

    def _snapshot(self, model_id: str, seq_id: int) -> tuple[sa.UpdateBase, ...]:
        """Write a model down as it is after a request; return what notes that."""
        seat = self.seats[model_id]
        folder = self.deployment.snapshot_folder(model_id, seq_id)
        self._write(model_id, folder, with_moments=True)
        seat.snapshot_updates = seat.updates
        return with_snapshot(model_id, folder, seq_id, seat.updates)


def _job(row: RequestRow, content: Any) -> Job:
    is_replay = row.finished_at is not None
    return Job(
        row.id,
        row.tenant,
        row.model_id,
        row.seq_id,
        row.kind,
        content,
        row.arrived_at,
        is_replay,
        is_suspect=row.tries > 0 and not is_replay,
    )


def _update_of(slot: int, content: dict[str, Any]) -> Update:
    settings: dict[str, float] = content["adam_params"]
    adam = AdamSettings(
        settings["beta1"], settings["beta2"], settings["eps"], settings["weight_decay"]
    )
    return Update(slot, settings["learning_rate"], settings["grad_clip_norm"], adam)


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()
