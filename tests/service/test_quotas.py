"""Quotas are kept, and what is to be deleted is: from the database and from disk."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lobra.cli import main
from lobra.service import coordinator, intake, quotas, retention, seats
from lobra.service import ledger as ledger_module
from lobra.service.ledger import Ledger
from lobra.service.tables import (
    OF_TENANTS,
    SAMPLE,
    RequestRow,
    losses,
    requests,
    samplers,
    sessions,
)
from lobra.service.tenants import add_tenant
from tests.service.support import Client, Running, logprobs_of
from tests.service.test_requests import datum, refused

pytestmark = pytest.mark.ranks


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def saved(client: Client, model: str, name: str, **fields: Any) -> Any:
    return client.result(client.asked("save_weights", model_id=model, path=name, **fields))


def step(client: Client, model: str, seq_id: int) -> None:
    client.losses(model, seq_id, [datum()])
    update = client.asked("optim_step", model_id=model, seq_id=seq_id + 1, adam_params={})
    assert client.result(update)["metrics"]["grad_norm"] > 0


def test_what_may_be_stored_is_bounded(mixed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "RETENTION_S", 0.05)
    client = mixed.client("storing", stored_bytes=20_000)
    model = client.new_model(client.new_session(), 0, rank=2)
    assert saved(client, model, "a", seq_id=1)["path"]
    assert "of 20,000; delete" in saved(client, model, "b", seq_id=2)["error"]
    refused(client.losses(model, 3, [datum()]), 403, "storing", "20,000")
    assert client.send("DELETE", f"training_runs/{model}/checkpoints/weights/a")[0] == 204
    assert saved(client, model, "b", seq_id=4)["path"]
    folder = mixed.service.deployment.state_folder.model(model) / "weights"
    wait_until(lambda: [path.name for path in folder.iterdir()] == ["b.4"])


def test_what_is_written_again_takes_the_place_of_the_older(
    mixed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "RETENTION_S", 0.05)
    client = mixed.client("again")
    model = client.new_model(client.new_session(), 0, rank=2)
    for number in (1, 2):
        saved(client, model, "a", seq_id=number, overwrite=True)
    folder = mixed.service.deployment.state_folder.model(model) / "weights"
    wait_until(lambda: [path.name for path in folder.iterdir()] == ["a.2"])


def test_a_tenant_takes_turns_with_itself_where_it_has_one_slot(mixed: Running) -> None:
    client = mixed.client("one-slot", slots=1)
    session = client.new_session()
    models = [client.new_model(session, number, rank=2) for number in range(2)]
    for seq_id in (1, 3):
        for model in models:
            step(client, model, seq_id)
            assert [name for name in models if name in mixed.service.coordinator.seats.taken] == [
                model
            ]


def test_who_never_rests_takes_turns_too(mixed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three models have much to do each, and there are two slots."""
    monkeypatch.setattr(seats, "TURN_S", 0.02)
    clients = [mixed.client(f"turn{number}") for number in range(3)]
    models = [client.new_model(client.new_session(), 0, rank=2) for client in clients]
    futures = []
    for seq_id in range(1, 13, 2):
        for client, model in zip(clients, models, strict=True):
            futures.append((client, client.losses(model, seq_id, [datum(20)])[1]))
            fields = dict(model_id=model, seq_id=seq_id + 1)
            futures.append((client, client.asked("optim_step", adam_params={}, **fields)))
    found = [client.result(future) for client, future in futures]
    assert all("error" not in result for result in found if isinstance(result, dict))


def test_requests_that_wait_are_bounded_but_for_what_others_wait_for(
    mixed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "MOST_WAITING_BYTES", 1000)
    client = mixed.client("waiting")
    model = client.new_model(client.new_session(), 0, rank=2)
    late = client.losses(model, 2, [datum(60)])[1]
    refused(client.losses(model, 3, [datum()]), 429, "of 10,000 and 1,000", "wait")
    first = client.losses(model, 1, [datum(60)])[1]
    for future in (first, late):
        assert [len(own) for own in logprobs_of(client.result(future))] == [60]
    assert client.losses(model, 3, [datum()])[0] == 200


def test_sessions_and_sampling_sessions_are_bounded(
    mixed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quotas, "MOST_SESSIONS", 2)
    monkeypatch.setattr(quotas, "MOST_SAMPLERS", 1)
    client = mixed.client("connecting")
    session, _ = client.new_session(), client.new_session()
    refused(client.post("create_session"), 429, "has 2 sessions, and may have 2")
    make = dict(session_id=session, sampling_session_seq_id=0, base_model="base")
    assert [client.post("create_sampling_session", **make)[0] for _ in range(2)] == [200, 200]
    make["sampling_session_seq_id"] = 1
    refused(client.post("create_sampling_session", **make), 429, "has 1 sampling sessions")
    model = client.new_model(session, 0, rank=2)
    save = dict(model_id=model, seq_id=1, sampling_session_seq_id=2)
    refused(client.post("save_weights_for_sampler", **save), 429, "has 1 sampling sessions")
    monkeypatch.setattr(quotas, "MOST_SAMPLERS", 2)
    saved = client.result(client.asked("save_weights_for_sampler", **save))
    assert saved["sampling_session_id"] == f"{session}:sample:2"


def test_sessions_without_a_sign_of_life_have_their_time(
    mixed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not one with an open model, nor one that goes on."""
    monkeypatch.setattr(coordinator, "RETENTION_S", 0.05)
    client = mixed.client("resting")
    resting, open_one, going_on = names = [client.new_session() for _ in range(3)]
    for name in names:
        make = dict(session_id=name, sampling_session_seq_id=0, base_model="base")
        client.asked("create_sampling_session", **make)
    client.new_model(open_one, 0, rank=2)
    long_ago = time.time() - 8 * retention.DAY_S
    ledger = mixed.service.ledger
    own = sessions.c.tenant == "resting"
    monkeypatch.setattr(intake, "NOTE_SIGNS_S", -1.0)
    assert client.post("session_heartbeat", session_id=going_on)[0] == 200
    ledger.execute(sessions.update().where(own).values(created_at=long_ago))
    ledger.execute(sessions.update().where(own, sessions.c.id != going_on).values(seen_at=long_ago))
    wait_until(lambda: ledger.sampler(f"{resting}:sample:0") is None)
    refused(client.post("session_heartbeat", session_id=resting), 404, "session")
    assert set(client.send("GET", "sessions")[1]["sessions"]) == {open_one, going_on}
    for name in (open_one, going_on):
        assert ledger.sampler(f"{name}:sample:0") is not None


def test_a_sampling_session_is_over_with_its_weights_but_not_before_its_results(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    ledger.insert(sessions, {"id": "s", "tenant": "alice", "created_at": time.time()})
    for number, path in enumerate(("", "tinker://gone", "tinker://gone")):
        row = {"id": f"s:sample:{number}", "tenant": "alice", "path": path}
        ledger.insert(samplers, row)
    asked = RequestRow("a", "alice", "s:sample:2", 0, SAMPLE, b"", time.time())
    ledger.insert(requests, vars(asked))
    ledger.forget_sessions(time.time() - 60)
    found = [ledger.sampler(f"s:sample:{number}") is not None for number in range(3)]
    assert found == [True, False, True]


def test_checkpoints_and_models_have_their_time(
    mixed: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordinator, "RETENTION_S", 0.05)
    client = mixed.client("forgetting", keep_days=1)
    ledger, kept = mixed.service.ledger, mixed.service.deployment.state_folder
    model = client.new_model(client.new_session(), 0, rank=2)
    step(client, model, 1)
    path = saved(client, model, "a", seq_id=3, ttl_seconds=1)["path"]
    row = ledger.checkpoint(path)
    assert row is not None
    monkeypatch.setattr(retention, "DAY_S", 1e-3)
    wait_until(lambda: ledger.checkpoint(path) is None and not ledger.models_of("forgetting"))
    wait_until(lambda: not kept.checkpoint(row).exists())
    refused(client.losses(model, 4, [datum()]), 400, "closed")


def test_results_have_their_time(mixed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model goes on without them."""
    monkeypatch.setattr(coordinator, "RETENTION_S", 0.05)
    client = mixed.client("late")
    model = client.new_model(client.new_session(), 0, rank=2)
    future = client.losses(model, 1, [datum()])[1]
    client.result(future)
    monkeypatch.setattr(ledger_module, "RESULT_LIFE_S", 0.0)
    wait_until(
        lambda: client.post("retrieve_future", **{"request_id": future["request_id"]})[0] == 410
    )
    monkeypatch.undo()
    assert mixed.service.ledger.stored_bytes("late") < 2000
    update = client.asked("optim_step", model_id=model, seq_id=2, adam_params={})
    assert client.result(update)["metrics"]["grad_norm"] > 0


def test_all_of_a_tenant_is_deleted_while_others_train(
    mixed: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(coordinator, "RETENTION_S", 0.05)
    ledger, kept = mixed.service.ledger, mixed.service.deployment.state_folder
    client, other = mixed.client("leaving"), mixed.client("staying")
    models = [one.new_model(one.new_session(), 0, rank=2) for one in (client, other)]
    for one, model in zip((client, other), models, strict=True):
        step(one, model, 1)
        saved(one, model, "a", seq_id=3)
    stuck = client.losses(models[0], 9, [datum()])[1]
    words = ["keys", "delete-data", "leaving", "--state-dir", str(kept.path)]
    done = subprocess.run([sys.executable, "-m", "lobra", *words], capture_output=True, text=True)
    assert (done.returncode, "within seconds" in done.stdout) == (0, True), done.stderr
    wait_until(lambda: not kept.model(models[0]).exists())
    tables = [table.select().where(table.c.tenant == "leaving") for table in OF_TENANTS]
    tables.append(losses.select().where(losses.c.model_id == models[0]))
    assert [ledger.rows(query) for query in tables] == [[]] * len(tables)
    refused(client.post("retrieve_future", request_id=stuck["request_id"]), 410)
    refused(client.losses(models[0], 4, [datum()]), 404)
    step(other, models[1], 4)
    assert client.new_model(client.new_session(), 0, rank=2)


def test_all_of_a_tenant_is_deleted_where_no_service_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path)
    add_tenant(ledger, "bob")
    words = ["--state-dir", str(tmp_path)]
    assert main(["keys", "delete-data", "bob", *words]) == 0
    assert "all of bob is deleted" in capsys.readouterr().out
    assert main(["keys", "delete-data", "eve", *words]) == 2
    assert "nothing of it" in capsys.readouterr().err
