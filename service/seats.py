"""Who has a slot: models come to the ranks when they are asked for, and leave to make room.

A model that leaves is written down as a snapshot. When it is asked for again, that is installed and
the requests since are carried out once more; those that had a result keep it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lobra.common.storage import free_bytes
from lobra.layout.order import SlotOrder
from lobra.service.admission import AdapterSize
from lobra.service.backlog import LOSS_KINDS, Backlog, Job
from lobra.service.deployment import Deployment
from lobra.service.ledger import Ledger, with_snapshot
from lobra.service.tables import ModelRow, RequestRow
from lobra.service.tenants import tenant_named
from lobra.service.wire import loss_message

log = logging.getLogger(__name__)

ALPHA = 32.0  # of every adapter: the protocol has no field for it
MOST_TRIES = 3  # of a request during which the service ended
SNAPSHOT_UPDATES = 20  # updates after which a model's snapshot is renewed
SNAPSHOT_REQUESTS = 500  # requests after which it is, between two steps: results are kept no longer
IDLE_S = 10.0  # a model in the middle of a step keeps its slot so long
#: An adapter and its two moments, at most in fp64.
ADAPTER_AND_MOMENTS, ELEMENT_BYTES = 3, 8
TURN_S = 30.0  # while others wait, a model that never rests keeps its slot so long


@dataclass
class Seat:
    """A model that has a slot.

    Attributes
    ----------
    slot, tenant, adapter
        The slot's number, whose the model is, and its adapter's size.
    updates, snapshot_updates
        Updates it has had, now and at its last snapshot.
    snapshot_seq
        The request after which that was taken; -1: there is none.
    loss, weight
        Of the step in progress: the summed loss, and the absolute weights it is a sum of.
    has_gradient
        Whether it is in the middle of a step.
    has_progressed
        Whether a request has got its result since it has the slot.
    seated_at, used_at
        When it got the slot, and when it was last asked for (monotonic seconds).
    """

    slot: int
    tenant: str
    adapter: AdapterSize
    updates: int
    snapshot_updates: int
    snapshot_seq: int
    seated_at: float
    used_at: float
    loss: float = 0.0
    weight: float = 0.0
    has_gradient: bool = False
    has_progressed: bool = False


class Seats:
    """The slots and who has them; of the coordinator's thread.

    Attributes
    ----------
    taken
        The models that have a slot, by name.
    wanted
        Those that are asked for and have none, in the order they came: since when (monotonic
        seconds).
    """

    def __init__(
        self,
        deployment: Deployment,
        ledger: Ledger,
        backlog: Backlog,
        change_slot: Callable[[SlotOrder], None],
        give_up: Callable[[RequestRow, str], None],
    ) -> None:
        """Have slots changed on the ranks by one function, and requests given up by another."""
        self.deployment = deployment
        self.ledger = ledger
        self.backlog = backlog
        self.change_slot = change_slot
        self.give_up = give_up
        self.taken: dict[str, Seat] = {}
        self.wanted: dict[str, float] = {}
        self._lacks_room = False

    @property
    def slots(self) -> dict[str, int]:
        """The slot of every model that has one."""
        return {model_id: seat.slot for model_id, seat in self.taken.items()}

    def want(self, model_id: str) -> None:
        """Have a model seated; all its requests then come from the ledger."""
        self.wanted.setdefault(model_id, time.monotonic())

    def seat_wanted(self) -> None:
        """Give slots to models that are asked for, as far as there is room; who came first first.

        A model that memory does not hold even alone, since the deployment has changed, and one
        whose tenant has all the slots it may have, hold up nobody else.
        """
        for model_id, since in list(self.wanted.items()):
            model = self.ledger.model(model_id)
            assert model is not None, "what is wanted is open"
            if not self.deployment.admission.holds([model.adapter]):
                continue
            quota = tenant_named(self.ledger, model.tenant)
            most = quota.slots if quota is not None and quota.slots else self.deployment.max_slots
            own = [name for name, seat in self.taken.items() if seat.tenant == model.tenant]
            is_crowded = len(own) >= most
            slot = self._room_for(model, since, own if is_crowded else None)
            if slot is not None:
                del self.wanted[model_id]
                self._seat(model, slot)
            elif not is_crowded:
                return

    def _room_for(self, model: ModelRow, since: float, own: list[str] | None) -> int | None:
        """Return a slot for a model, which others leave if they must; None: it has to wait.

        Where its tenant may have no more slots, one of ``own`` leaves first.
        """
        if own is not None:
            if (leaving := self._leaving(own, since)) is None:
                return None
            self._put_aside(leaving)
        while True:
            free = set(range(self.deployment.max_slots)) - set(self.slots.values())
            adapters = [seat.adapter for seat in self.taken.values()]
            if free and self.deployment.admission.holds([*adapters, model.adapter]):
                return min(free)
            if (leaving := self._leaving(list(self.taken), since)) is None:
                return None
            self._put_aside(leaving)

    def _leaving(self, names: list[str], since: float) -> str | None:
        """Return which of these models leaves for one that has waited since then; None: none.

        The one that has rested longest, else the one that has had its turn longest. In the middle
        of a step a model keeps its slot, at least for a while: its gradient would have to be
        computed again.
        """
        now = time.monotonic()
        busy = {job.model_id for job in self.backlog.heads()}
        idle, over = [], []
        for name in names:
            seat = self.taken[name]
            if name not in busy and (not seat.has_gradient or now - seat.used_at > IDLE_S):
                idle.append((seat.used_at, name))
            may_leave = seat.has_progressed and not seat.has_gradient
            if may_leave and min(now - since, now - seat.seated_at) > TURN_S:
                over.append((seat.seated_at, name))
        return min(idle or over, default=(0.0, None))[1]

    def _put_aside(self, model_id: str) -> None:
        """Take a model's slot away; it is wanted again if it has more to do."""
        seat = self.taken[model_id]
        if not seat.has_gradient and seat.updates > seat.snapshot_updates:
            self.take_snapshot(model_id)
        if self.backlog.queues[model_id].jobs:
            self.ledger.forget_tries(model_id)
            self.want(model_id)
        self.leave(model_id)

    def _seat(self, model: ModelRow, slot: int) -> None:
        """Give a model a slot; its requests since its snapshot are carried out, again or at last.

        Of a model without a snapshot the first request installs what it starts from.
        """
        updates, now = model.snapshot_updates, time.monotonic()
        self.taken[model.id] = Seat(
            slot, model.tenant, model.adapter, updates, updates, model.snapshot_seq, now, now
        )
        self.backlog.open(model.id, model.tenant, model.snapshot_seq + 1)
        if model.snapshot_seq >= 0:
            folder = self.deployment.state_folder.snapshot(model.id, model.snapshot_seq)
            self.install(model.id, folder, with_moments=True)
        for row in self.ledger.requests_after(model.id, model.snapshot_seq):
            self.backlog.add(self._job_again(row))

    def _job_again(self, row: RequestRow) -> Job:
        """Return the job of a request that the ledger has; "nothing" if it has no effect left."""
        if row.kind not in LOSS_KINDS:
            assert row.body is not None, "bodies are kept until a snapshot has their effect"
            return job_of(row, json.loads(row.body))
        if row.finished_at is None and row.tries >= MOST_TRIES:
            error = f"the service ended {row.tries} times while it computed this; send less"
            self.give_up(row, error)
            row = replace(row, finished_at=time.time(), error=error)
        if row.error is not None or row.body is None:
            return replace(job_of(row, None), kind="nothing")
        return job_of(row, self.deployment.read_loss_request(loss_message(row.body)))

    # -- a slot ---------------------------------------------------------------------------------

    def install(
        self, model_id: str, folder: Path | None = None, with_moments: bool = False
    ) -> None:
        """Give a model's slot its adapter, as a folder has it, or as it starts."""
        model = self.ledger.model(model_id)
        assert model is not None
        seat = self.taken[model_id]
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
        self.change_slot(order)

    def leave(self, model_id: str) -> None:
        """Take a model's slot away."""
        seat = self.taken.pop(model_id)
        self.backlog.close(model_id)
        self.change_slot(SlotOrder("remove", seat.slot))

    def write(self, model_id: str, folder: Path, with_moments: bool) -> None:
        """Write a model's adapter to a folder."""
        slot = self.taken[model_id].slot
        self.change_slot(SlotOrder("save", slot, folder=str(folder), moments=with_moments))

    def has_room(self, model_id: str, also_bytes: int = 0) -> bool:
        """Return whether the disk has room for a model, moments included, and for more bytes."""
        elements = self.deployment.shape.adapter_elements(*self.taken[model_id].adapter)
        need_bytes = ADAPTER_AND_MOMENTS * ELEMENT_BYTES * elements + also_bytes
        return free_bytes(self.deployment.state_folder.path) >= need_bytes

    # -- snapshots ------------------------------------------------------------------------------

    def snapshot_if_due(self, model_id: str) -> None:
        """Take a snapshot of a model if there is much to be carried out again without one."""
        seat = self.taken[model_id]
        requests = self.backlog.queues[model_id].next_seq - 1 - seat.snapshot_seq
        if not seat.has_gradient and (
            seat.updates - seat.snapshot_updates >= SNAPSHOT_UPDATES
            or requests >= SNAPSHOT_REQUESTS
        ):
            self.take_snapshot(model_id)

    def take_snapshots(self) -> None:
        """Take a snapshot of every model that is between two steps."""
        for model_id, seat in self.taken.items():
            if not seat.has_gradient and seat.updates > seat.snapshot_updates:
                self.take_snapshot(model_id)

    def take_snapshot(self, model_id: str) -> None:
        """Write a model down as it is after the last request that was carried out.

        Where the disk has no room it is not: what the model is follows from an older snapshot too.
        """
        if not self.has_room(model_id):
            if not self._lacks_room:
                log.error(
                    "%s: its disk has no room for snapshots of models: make room, or a restart has "
                    "ever more to carry out again",
                    self.deployment.state_folder.path,
                )
            self._lacks_room = True
            return
        self._lacks_room = False
        seq_id = self.backlog.queues[model_id].next_seq - 1
        self.ledger.execute(*self.snapshot(model_id, seq_id))

    def snapshot(self, model_id: str, seq_id: int) -> tuple[sa.UpdateBase, ...]:
        """Write a model down as it is after a request; return what notes that."""
        seat = self.taken[model_id]
        folder = self.deployment.state_folder.snapshot(model_id, seq_id)
        self.write(model_id, folder, with_moments=True)
        seat.snapshot_updates, seat.snapshot_seq = seat.updates, seq_id
        return with_snapshot(model_id, seq_id, seat.updates)


def job_of(row: RequestRow, content: Any) -> Job:
    """Return the job of a request."""
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
