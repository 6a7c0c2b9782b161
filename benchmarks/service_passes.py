"""Passes of several tenants' requests against passes of one tenant at a time.

Every tenant has its model and makes steps one after another, as a training script does: it sends
its data and its update, and waits for both. HTTP is left out. Both ways are tried in turn in one
service, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lobra.common.options import Device, PositiveInt
from lobra.service.backlog import LOSS_KINDS, Backlog, Pass
from lobra.service.bodies import CreateModel
from lobra.service.deployment import ServeRequest, prepare_deployment
from lobra.service.ledger import RequestRow
from lobra.service.server import Service
from lobra.service.tenants import Tenant
from lobra.service.wire import Datum, LossRequest

ADAM = dict(
    learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0
)
FIRST_TOKEN = 3  # those before it may be special


class OneTenantAPass(Backlog):
    """The other way: a pass is of the tenant that has waited longest."""

    def next_pass(self, max_tokens: int, now: float) -> Pass | None:
        """Return what is computed next, all of it one tenant's."""
        every = self.queues
        heads = [head for head in self.heads() if head.kind in LOSS_KINDS]
        try:
            if heads:
                first = heads[0].tenant
                self.queues = {name: q for name, q in every.items() if q.tenant == first}
            return super().next_pass(max_tokens, now)
        finally:
            self.queues = every


def service_passes(
    *,
    model: str = "tiny",
    strategy_config: str | None = None,
    device: Device = "auto",
    tenants: tuple[PositiveInt, ...] = (1, 4, 16),
    steps: PositiveInt = 5,
    data: PositiveInt = 4,
    tokens: PositiveInt = 64,
    rounds: PositiveInt = 3,
) -> Iterator[dict[str, float]]:
    """Compare the time that all tenants' steps take, for several numbers of tenants.

    Parameters
    ----------
    model
        The base model.
    strategy_config
        The plan; by default one replica <1,1>.
    tenants
        How many train at once.
    steps
        Of each tenant, in a round.
    data
        Sequences of a step.
    tokens
        Tokens of the longest sequence; lengths are uniform from an eighth of it on.
    rounds
        Times each way is tried; the fastest counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = ServeRequest(
            model, strategy_config, state_dir=Path(folder), device=device, max_slots=max(tenants)
        )
        with _running(request) as service:
            finished = _Finished()
            service.coordinator.finished = finished.note
            trainers = [_Trainer(service, finished, number) for number in range(max(tenants))]
            shape = service.deployment.shape
            for count in tenants:
                best = {"joint_s": np.inf, "one_tenant_s": np.inf}
                for _ in range(rounds):
                    for way, kind in (("joint_s", Backlog), ("one_tenant_s", OneTenantAPass)):
                        _change(service, kind())
                        steps_of = [
                            trainer.draw(steps, data, tokens, shape.vocab_size)
                            for trainer in trainers[:count]
                        ]
                        start = time.perf_counter()
                        with ThreadPoolExecutor(count) as pool:
                            list(pool.map(_Trainer.train, trainers[:count], steps_of))
                        best[way] = min(best[way], time.perf_counter() - start)
                yield {
                    "tenants": count,
                    **best,
                    "ratio": best["one_tenant_s"] / best["joint_s"],
                    "joint_step_ms": 1000.0 * best["joint_s"] / steps,
                }


@contextmanager
def _running(request: ServeRequest) -> Iterator[Service]:
    service = Service(prepare_deployment(request), "127.0.0.1", 0)
    ready = threading.Event()
    thread = threading.Thread(target=service.run, args=(ready.set,))
    thread.start()
    ready.wait()
    try:
        yield service
    finally:
        service.stop()
        thread.join()


def _change(service: Service, backlog: Backlog) -> None:
    """Have the service, which has nothing to do, go on with another backlog."""
    backlog.queues = service.coordinator.backlog.queues
    service.coordinator.backlog = service.coordinator.seats.backlog = backlog


class _Finished:
    """The names of the requests that are finished."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._changed = threading.Condition()

    def note(self, name: str) -> None:
        with self._changed:
            self._names.add(name)
            self._changed.notify_all()

    def wait(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: name in self._names)


class _Trainer:
    """A tenant with a model."""

    def __init__(self, service: Service, finished: _Finished, number: int) -> None:
        self.service = service
        self.finished = finished
        self.tenant = Tenant(f"tenant{number}", 0.0, None, max_models=1)
        self.generator = np.random.default_rng(number)
        session = service.intake.new_session(self.tenant)
        name = service.deployment.names[0]
        body = CreateModel(session_id=session, model_seq_id=0, base_model=name)
        row = service.intake.create_model(self.tenant, body)
        self.model = row.model_id
        self.seq_id = 0
        self.finished.wait(row.id)

    def draw(self, steps: int, data: int, tokens: int, vocabulary: int) -> list[tuple[Datum, ...]]:
        """Return random data of some steps."""

        def datum() -> Datum:
            length = int(self.generator.integers(max(1, tokens // 8), tokens, endpoint=True))
            ids = self.generator.integers(FIRST_TOKEN, vocabulary, (2, length)).astype(np.int32)
            return Datum(ids[0], ids[1], np.ones(length))

        return [tuple(datum() for _ in range(data)) for _ in range(steps)]

    def train(self, steps: list[tuple[Datum, ...]]) -> None:
        """Make steps, each when the one before is done."""
        for data in steps:
            content = LossRequest(self.model, self.seq_id + 1, data, forward_only=False)
            losses = self._send("forward_backward", content)
            update = self._send("optim_step", {"adam_params": ADAM})
            self.finished.wait(losses.id)
            self.finished.wait(update.id)

    def _send(self, kind: str, content: object) -> RequestRow:
        self.seq_id += 1
        submit = self.service.intake.submit
        return submit(self.tenant, self.model, self.seq_id, kind, b"", content)
