"""Each tenant gets the adapter that PEFT gets from its requests alone, whoever else trains.

In fp64, as `tests.trainer.test_equality` explains.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lobra.service import ranks, seats
from lobra.service.backlog import Backlog, Pass
from lobra.service.passes import PassRunner
from lobra.service.wire import Datum
from tests.service.peft_alone import Step, train_with_peft
from tests.service.support import Client, Running, deployment_of, logprobs_of, running

pytestmark = pytest.mark.ranks

BAR = 1e-8
FLOAT32_BAR = 1e-5  # logprobs are sent in it
VOCAB = 256
STEPS = 3
#: Of each tenant: its adapter, its updates, its lengths, data of each call of a step.
TENANTS: tuple[dict[str, Any], ...] = (
    dict(
        adapter=dict(rank=4, seed=7),
        adam=dict(learning_rate=3e-3),
        lengths=(5, 30),
        calls=(3, 1, 2),
    ),
    dict(
        adapter=dict(rank=8, train_mlp=False, train_unembed=False),
        adam=dict(learning_rate=1e-2, beta1=0.8, beta2=0.99, eps=1e-8, weight_decay=0.1),
        lengths=(2, 12),
        calls=(9,),
    ),
    dict(
        adapter=dict(rank=1, train_attn=False, train_mlp=False),
        adam=dict(learning_rate=2e-3, grad_clip_norm=0.05),
        lengths=(60, 64),
        calls=(1, 1),
    ),
    dict(
        adapter=dict(rank=16),
        adam=dict(learning_rate=5e-3, weight_decay=0.01, grad_clip_norm=3.0),
        lengths=(1, 40),
        calls=(4, 4, 4),
    ),
)
ADAM = dict(beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=0.0)


def steps_of(number: int) -> list[Step]:
    """Return a tenant's steps; labels are of any tokens, weights of any sign."""
    tenant, generator = TENANTS[number], np.random.default_rng(number)

    def datum() -> Datum:
        length = int(generator.integers(*tenant["lengths"], endpoint=True))
        tokens = generator.integers(3, VOCAB, (2, length)).astype(np.int32)
        weights = generator.normal(size=length).astype(np.float32).astype(np.float64)
        weights[generator.random(length) < 0.3] = 0.0
        return Datum(*tokens, weights)

    return [
        Step(
            tuple(tuple(datum() for _ in range(count)) for count in tenant["calls"]),
            {**ADAM, **tenant["adam"]},
        )
        for _ in range(STEPS)
    ]


class Trainer:
    """A tenant's program: it sends a step's requests the last one first, and waits for them."""

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.number = number
        self.session = client.new_session()
        self.model = client.new_model(self.session, 0, **TENANTS[number]["adapter"])
        self.seq_id = 0
        self.logprobs: list[np.ndarray] = []

    def next_seq(self) -> int:
        self.seq_id += 1
        return self.seq_id

    def save(self, route: str, name: str, **fields: Any) -> str:
        future = self.client.asked(
            route, model_id=self.model, seq_id=self.next_seq(), path=name, **fields
        )
        return str(self.client.result(future)["path"])

    def send(self, step: Step) -> list[dict[str, Any]]:
        """Send a step's requests; return what to ask for their results by, in order."""
        numbered = [(self.next_seq(), call) for call in step.calls]
        last = self.client.asked(
            "optim_step", model_id=self.model, seq_id=self.next_seq(), adam_params=step.adam
        )
        futures = []
        for seq_id, call in reversed(numbered):
            status, future = self.client.losses(self.model, seq_id, call)
            assert status == 200, future
            futures.insert(0, future)
        return [*futures, last]

    def receive(self, futures: list[dict[str, Any]]) -> None:
        *losses, last = [self.client.result(future) for future in futures]
        self.logprobs += [own for content in losses for own in logprobs_of(content)]
        assert last["metrics"]["grad_norm"] > 0

    def train(self, steps: list[Step]) -> None:
        for step in steps:
            self.receive(self.send(step))


def folder_of(found: Running, path: str) -> Path:
    row = found.service.ledger.checkpoint(path)
    assert row is not None
    return found.service.deployment.state_folder.checkpoint(row)


def check(found: Running, trainer: Trainer, start: str, end: str, folder: Path) -> None:
    """Compare what a tenant got with what PEFT gets."""
    base = found.service.deployment.run.model_folder
    tensors, logprobs = train_with_peft(
        base, folder_of(found, start), steps_of(trainer.number), folder / str(trainer.number)
    )
    own = load_file(folder_of(found, end) / "adapter_model.safetensors")
    assert own.keys() == tensors.keys()
    for name, value in tensors.items():
        assert own[name].dtype == torch.float64
        torch.testing.assert_close(own[name], value, rtol=BAR, atol=BAR)
    for mine, theirs in zip(trainer.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=FLOAT32_BAR, atol=FLOAT32_BAR)


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.long)])
def test_tenants_get_what_they_would_get_alone(
    mixed: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """All at once, of which all but two have to wait outside, in the middle of a step or not."""
    monkeypatch.setattr(seats, "IDLE_S", 0.0)
    monkeypatch.setattr(seats, "TURN_S", 0.05)

    def train(number: int) -> tuple[Trainer, str, str]:
        trainer = Trainer(mixed.client(f"tenant{number}of{count}"), number % len(TENANTS))
        start = trainer.save("save_weights_for_sampler", "start")
        trainer.train(steps_of(trainer.number))
        return trainer, start, trainer.save("save_weights_for_sampler", "end")

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(train, range(count)))
    for trainer, start, end in results:
        check(mixed, trainer, start, end, tmp_path)


def test_where_tasks_are_computed_at_once_one_that_is_not_finite_spoils_no_other(
    base: Path, mixed: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shares every pass with a model whose first update was beyond bounds."""
    plain, sent = Backlog.next_pass, threading.Event()

    def together(self: Backlog, max_tokens: int, now: float) -> Pass | None:
        return plain(self, max_tokens, now) if sent.is_set() else None

    tokens = np.arange(3, 23, dtype=np.int32)
    data = [Datum(tokens, tokens[::-1].copy(), np.ones(20))]
    adam = {**ADAM, "learning_rate": 0.01}

    def train(client: Client, model: str, rate: float, last: bool) -> list[dict[str, Any]]:
        futures = []
        for step in range(3):
            futures += [client.losses(model, 3 * step + call, data)[1] for call in (1, 2)]
            fields = dict(model_id=model, seq_id=3 * step + 3)
            settings = {**adam, "learning_rate": rate}
            futures.append(client.asked("optim_step", adam_params=settings, **fields))
        if last:  # but for one request, which wakes the coordinator
            sent.set()
        save = dict(model_id=model, seq_id=10, path="end")
        return [*futures, client.asked("save_weights_for_sampler", **save)]

    alone = mixed.client("alone")
    model = alone.new_model(alone.new_session(), 0, rank=4, seed=1)
    expected = [alone.result(future) for future in train(alone, model, 0.01, True)][-1]["path"]
    monkeypatch.setattr(ranks, "RANK_TARGET", "tests.service.joined:serve_joined")
    with running(deployment_of(base, tmp_path / "state", [(1, 1)], 64, precision="fp64")) as found:
        clients = [found.client(name) for name in ("good", "bad")]
        models = [one.new_model(one.new_session(), 0, rank=4, seed=1) for one in clients]
        monkeypatch.setattr(Backlog, "next_pass", together)
        sent.clear()
        futures = [
            train(client, model, rate, client is clients[-1])
            for client, model, rate in zip(clients, models, (0.01, 1e300), strict=True)
        ]
        good, bad = (
            [client.result(future) for future in own]
            for client, own in zip(clients, futures, strict=True)
        )
        assert "not finite" in bad[5]["error"]
        own = load_file(folder_of(found, good[-1]["path"]) / "adapter_model.safetensors")
    for name, value in load_file(folder_of(mixed, expected) / "adapter_model.safetensors").items():
        torch.testing.assert_close(own[name], value, rtol=BAR, atol=BAR)


def test_a_checkpoint_goes_on_bit_by_bit(mixed: Running) -> None:
    client = mixed.client("resuming")
    trainer = Trainer(client, 0)
    steps = steps_of(0)
    trainer.train(steps[:1])
    path = trainer.save("save_weights", "middle")
    trainer.train(steps[1:])
    fields = dict(session_id=trainer.session, path=path, optimizer=True)
    again = Trainer(client, 0)
    again.model = client.result(client.asked("load_weights", model_seq_id=1, **fields))["model_id"]
    assert again.model == f"{trainer.session}:train:1"
    again.train(steps[1:])
    for one, other in zip(trainer.logprobs[-12:], again.logprobs[-12:], strict=True):
        np.testing.assert_array_equal(one, other)
    saved = [one.save("save_weights", "end") for one in (trainer, again)]
    for file in ("adapter_model.safetensors", "moments.safetensors"):
        one, other = (load_file(folder_of(mixed, end) / file) for end in saved)
        for name, value in one.items():
            assert torch.equal(other[name], value), name
    fresh = client.asked("load_weights", model_seq_id=2, **{**fields, "optimizer": False})
    model = client.result(fresh)["model_id"]
    assert mixed.service.ledger.model(model).snapshot_updates == 0


MOMENTS = [(count, noted) for count in range(1, 18) for noted in (False, True)]


@pytest.mark.parametrize(
    ("count", "noted"),
    [
        moment if moment == (9, False) else pytest.param(*moment, marks=pytest.mark.long)
        for moment in MOMENTS
    ],
)
def test_what_is_killed_goes_on_where_it_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, noted: bool
) -> None:
    """The coordinator dies when it notes something, before that is on disk or after it.

    All requests are under way. Another service takes the folder over, and gives their results.
    """
    monkeypatch.setattr(seats, "SNAPSHOT_UPDATES", 1)
    deployment = deployment_of(base, tmp_path / "state", [(1, 1)], 64, precision="fp64")
    number = 3
    with running(deployment) as found:
        client = found.client("tenant")
        trainer = Trainer(client, number)
        plain, left, sent = found.service.coordinator.ledger.execute, [count], threading.Event()

        def dying(*statements: Any) -> int:
            sent.wait(30)
            left[0] -= 1
            if left[0] == 0 and not noted:
                raise EOFError
            changed = plain(*statements)
            if left[0] == 0:
                raise EOFError
            return changed

        monkeypatch.setattr(found.service.coordinator.ledger, "execute", dying)
        save = dict(model_id=trainer.model, path="start")
        saves = [client.asked("save_weights", seq_id=trainer.next_seq(), **save)]
        futures = [trainer.send(step) for step in steps_of(number)]
        save["path"] = "end"
        saves += [client.asked("save_weights_for_sampler", seq_id=trainer.next_seq(), **save)]
        sent.set()
        deadline = time.monotonic() + 30
        while not found.crashed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with running(deployment) as found:
        trainer.client = Client(found.port, client.key)
        for own in futures:
            trainer.receive(own)
        start, end = (trainer.client.result(save)["path"] for save in saves)
        check(found, trainer, start, end, tmp_path)


@pytest.mark.long
def test_a_request_that_ends_the_service_is_given_up(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sent with another's, which gets its result at last; its model goes on without it."""
    deployment = deployment_of(base, tmp_path / "state", [(1, 1)], 64, precision="fp64")
    plain = PassRunner.run

    def run(self: PassRunner, work: Any, slots: Any) -> None:
        if any(len(datum.tokens) == 13 for _, datum in work.data):
            raise EOFError
        plain(self, work, slots)

    monkeypatch.setattr(PassRunner, "run", run)

    def data(length: int) -> list[Datum]:
        tokens = np.arange(3, 3 + length, dtype=np.int32)
        return [Datum(tokens, tokens, np.ones(length))]

    futures: list[dict[str, Any]] = []
    keys: list[str] = []
    for _ in range(seats.MOST_TRIES):
        with running(deployment) as found:
            if not keys:
                clients = [found.client(name) for name in ("bad", "good")]
                keys = [client.key for client in clients]
                models = [client.new_model(client.new_session(), 0) for client in clients]
                for client, model, length in zip(clients, models, (13, 5), strict=True):
                    futures.append(client.losses(model, 1, data(length))[1])
            deadline = time.monotonic() + 30
            while not found.crashed:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    with running(deployment) as found:
        bad, good = (Client(found.port, key) for key in keys)
        assert "3 times" in bad.result(futures[0])["error"]
        assert [len(own) for own in logprobs_of(good.result(futures[1]))] == [5]
        assert len(logprobs_of(bad.result(bad.losses(models[0], 2, data(7))[1]))) == 1
