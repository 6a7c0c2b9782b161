"""What is asked of a model beside losses and updates: it is made, loaded, saved, closed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Protocol

import sqlalchemy as sa

from lobra.layout.order import SlotOrder
from lobra.service.backlog import Job
from lobra.service.deployment import PATH_PREFIX, Deployment
from lobra.service.ledger import Ledger, with_row
from lobra.service.retention import DAY_S
from lobra.service.seats import Seats
from lobra.service.tables import SERVER, USER, CheckpointRow, SamplerRow, checkpoints, samplers
from lobra.service.tenants import tenant_named

SAMPLING_LIFE_S = DAY_S  # of weights that were saved without a name, only to be sampled from
FREE_BYTES = 1 << 30  # that are left on the disk: the ledger needs some to go on
WEIGHTS, SAMPLER_WEIGHTS = "weights", "sampler_weights"


def sampler_name(session_id: str, seq_id: int) -> str:
    """Return the name of a session's sampling session."""
    return f"{session_id}:sample:{seq_id}"


class RequestError(Exception):
    """Why a request that was accepted has no result, and by whose fault; its tenant is told."""

    def __init__(self, sentence: str, category: str = USER) -> None:
        super().__init__(sentence)
        self.category = category


class Finish(Protocol):
    """Notes what became of a job, and with it, as one, what else is to be noted."""

    def __call__(
        self,
        job: Job,
        result: bytes | None = None,
        error: str | None = None,
        also: Iterable[sa.UpdateBase] = (),
        category: str = USER,
    ) -> None:
        """Note it."""


class ModelChanges:
    """Carries such requests out; of the coordinator's thread."""

    def __init__(
        self, deployment: Deployment, ledger: Ledger, seats: Seats, finish: Finish
    ) -> None:
        self.deployment = deployment
        self.ledger = ledger
        self.seats = seats
        self.finish = finish

    def carry_out(self, job: Job) -> None:
        """Carry a request out, by the method of its kind."""
        change = getattr(self, f"_{job.kind}")
        try:
            if job.is_replay and job.kind.startswith("save"):
                self.finish(job)
            else:
                change(job)
        except RequestError as error:
            self.finish(job, error=str(error), category=error.category)
            if not job.seq_id:  # there is no model then
                del self.seats.taken[job.model_id]
                self.seats.backlog.close(job.model_id)
                self.close(job.model_id)

    def close(self, model_id: str) -> None:
        """Train a model no more; requests that still wait get no result."""
        self.ledger.close_model(model_id)
        self.seats.wanted.pop(model_id, None)
        for row in self.ledger.requests_after(model_id, -1):
            if row.finished_at is None:
                self.seats.give_up(row, f"model {model_id} is closed")

    def _nothing(self, job: Job) -> None:
        """Go on after a request that was given up."""
        self.finish(job)

    def _create_model(self, job: Job) -> None:
        self.seats.install(job.model_id)
        self.finish(job, as_json(type="create_model", model_id=job.model_id))

    def _load_weights(self, job: Job) -> None:
        """Give a model the weights of a checkpoint, and its moments if asked for."""
        path, with_moments = job.content["path"], job.content["optimizer"]
        found = self.ledger.checkpoint(path)
        if found is None or found.tenant != job.tenant:
            raise RequestError(f"{path}: there is no such checkpoint")
        if with_moments and found.kind != WEIGHTS:
            raise RequestError(f"{path}: has no optimizer state; only what save_state wrote has")
        own, source = self.ledger.model(job.model_id), self.ledger.model(found.model_id)
        assert own is not None and source is not None, "models are forgotten with their checkpoints"
        if own.adapter != source.adapter:
            raise RequestError(f"{path}: is of another rank or of other modules than this model")
        self._check_disk(job, path)
        seats, seat = self.seats, self.seats.taken[job.model_id]
        if job.seq_id:
            seats.change_slot(SlotOrder("remove", seat.slot))
        seat.updates = found.updates if with_moments else 0
        seat.has_gradient = False
        seat.loss = seat.weight = 0.0
        seats.install(job.model_id, self.deployment.state_folder.checkpoint(found), with_moments)
        # Whatever becomes of the checkpoint, the model does not depend on it.
        snapshot = seats.snapshot(job.model_id, job.seq_id)
        answer = as_json(type="load_weights", path=path, model_id=job.model_id)
        self.finish(job, answer, also=snapshot)

    def _unload_model(self, job: Job) -> None:
        self.ledger.close_model(job.model_id)  # first: who is answered may make another
        self.finish(job, as_json(type="unload_model", model_id=job.model_id))
        self.seats.leave(job.model_id)
        self.close(job.model_id)

    def _save_weights(self, job: Job) -> None:
        self._save(job, WEIGHTS)

    def _save_weights_for_sampler(self, job: Job) -> None:
        self._save(job, SAMPLER_WEIGHTS)

    def _save(self, job: Job, kind: str) -> None:
        content, seat = job.content, self.seats.taken[job.model_id]
        name = content["path"] or f"for-sampling-{job.seq_id}"
        path = f"{PATH_PREFIX}{job.model_id}/{kind}/{name}"
        is_new = self.ledger.checkpoint(path) is None
        if not is_new and kind == WEIGHTS and not content["overwrite"]:
            raise RequestError(f"{path}: there is one already; save it with overwrite=True")
        self._check_room(job, path)
        now = time.time()
        life_s = content["ttl_seconds"] or self._life_s(job)
        row = CheckpointRow(
            path,
            job.tenant,
            job.model_id,
            kind,
            name,
            job.seq_id,
            seat.updates,
            0,
            content["user_metadata"] or {},
            now,
            None if life_s is None else now + life_s,
        )
        folder = self.deployment.state_folder.checkpoint(row)
        self.seats.write(job.model_id, folder, kind == WEIGHTS)
        row = replace(row, size_bytes=sum(file.stat().st_size for file in folder.iterdir()))
        noted = [with_row(checkpoints, row)]
        answer = {"path": path}
        if content["path"] is None:
            session_id = job.model_id.partition(":")[0]
            sampler = sampler_name(session_id, content["sampling_session_seq_id"])
            noted.append(with_row(samplers, SamplerRow(sampler, job.tenant, path)))
            answer = {"sampling_session_id": sampler}
        self.finish(job, as_json(type=job.kind, **answer), also=noted)

    def _life_s(self, job: Job) -> float | None:
        """Return how long what a job saves is kept where it does not say so; None: for ever."""
        if job.content["path"] is None:
            return SAMPLING_LIFE_S
        tenant = tenant_named(self.ledger, job.tenant)
        return tenant.keep_days * DAY_S if tenant is not None and tenant.keep_days else None

    def _check_room(self, job: Job, path: str) -> None:
        """Raise a RequestError where the tenant, or the disk, may not take what is to be saved."""
        tenant = tenant_named(self.ledger, job.tenant)
        if tenant is not None and tenant.stored_bytes is not None:
            stored_bytes = self.ledger.stored_bytes(tenant.name)
            if stored_bytes >= tenant.stored_bytes:
                raise RequestError(
                    f"{path}: tenant {tenant.name} stores {stored_bytes:,} bytes, of "
                    f"{tenant.stored_bytes:,}; delete checkpoints"
                )
        self._check_disk(job, path, FREE_BYTES)

    def _check_disk(self, job: Job, path: str, also_bytes: int = 0) -> None:
        if not self.seats.has_room(job.model_id, also_bytes):
            why = "the service's disk has no room for it; tell its operator"
            raise RequestError(f"{path}: {why}", SERVER)


def as_json(**fields: Any) -> bytes:
    """Return the result of a request that has no protobuf message."""
    return json.dumps(fields).encode()
