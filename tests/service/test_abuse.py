"""Whatever is sent, the answer is a sentence, and the service goes on for others."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

import pytest

from lobra.service import body_limits, training_routes
from lobra.service.tenants import add_tenant, revoke
from lobra.service.wire import CONTENT_TYPE
from tests.service.support import ADDRESS, Client, Running, logprobs_of, loss_request
from tests.service.test_requests import datum, refused

pytestmark = pytest.mark.ranks

HUGE, LONG = 10**400, "a" * 5000
PROMPT = {"chunks": [{"tokens": [5]}]}


@pytest.fixture(scope="module")
def client(mixed: Running) -> Client:
    return mixed.client("abusing")


@pytest.fixture(scope="module")
def model(client: Client) -> str:
    return client.new_model(client.new_session(), 0, rank=2)


@pytest.mark.parametrize(
    ("route", "fields", "word"),
    [
        ("create_model", {"lora_config": {"rank": -4}}, "rank"),
        ("create_model", {"lora_config": {"rank": HUGE}}, "rank"),
        ("create_model", {"lora_config": {"rank": 2, "seed": HUGE}}, "seed"),
        ("create_model", {"model_seq_id": HUGE}, "model_seq_id"),
        ("create_model", {"user_metadata": {"a": float("nan")}}, "user_metadata"),
        ("create_model", {"user_metadata": {"a": "\ud800"}}, "user_metadata"),
        ("create_model", {"user_metadata": {"a": "b" * (1 << 17)}}, "user_metadata"),
        ("create_model", {"session_id": "\ud800"}, "surrogates"),
        ("create_model", {"base_model": "\ud800"}, "surrogates"),
        ("optim_step", {"adam_params": {"learning_rate": float("nan")}}, "learning_rate"),
        ("optim_step", {"adam_params": {"eps": float("inf")}}, "eps"),
        ("optim_step", {"adam_params": {}, "seq_id": HUGE}, "seq_id"),
        ("optim_step", {"adam_params": {}, "model_id": "\ud800"}, "surrogates"),
        ("save_weights", {"path": "a", "ttl_seconds": HUGE}, "ttl_seconds"),
        ("save_weights", {"path": "a" * 4000}, "path"),
        ("load_weights", {"path": "\ud800", "optimizer": True}, "surrogates"),
        ("retrieve_future", {"request_id": "\ud800"}, "surrogates"),
        ("asample", {"num_samples": HUGE}, "num_samples"),
        ("asample", {"prompt": PROMPT, "sampling_session_id": LONG}, "sampler"),
        ("create_sampling_session", {"model_path": LONG}, "checkpoint"),
        ("create_sampling_session", {"base_model": LONG}, "samples from"),
        ("create_model", {"session_id": LONG}, "session"),
        ("create_model", {"base_model": LONG}, "base_model"),
        ("load_weights", {"path": LONG, "optimizer": True}, "checkpoint"),
        ("optim_step", {"adam_params": {}, "model_id": LONG}, "model"),
        ("retrieve_future", {"request_id": LONG}, "request"),
        (LONG, {}, "does not offer that"),
    ],
)
def test_what_no_client_would_send_is_refused(
    client: Client, model: str, route: str, fields: dict[str, Any], word: str
) -> None:
    session = model.partition(":")[0]
    own = dict(session_id=session, model_id=model, model_seq_id=7, base_model="base")
    own |= dict(sampling_session_seq_id=0, seq_id=1, sampling_params={})
    answer = client.post(route, **{**own, **fields})
    assert 400 <= answer[0] < 500, answer
    assert word in answer[1]["detail"]
    assert len(answer[1]["detail"]) < 300, "what was sent is cut"


def test_bodies_that_are_none(client: Client) -> None:
    for body in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000, b"null"):
        status, answer = client.send("POST", "optim_step", body)
        assert (status, bool(answer["detail"])) == (400, True)


def test_a_client_that_vanishes_leaves_nothing_behind(
    mixed: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a body, and while it waits for a result that cannot come."""
    monkeypatch.setattr(training_routes, "POLL_S", 0.2)
    model = client.new_model(client.new_session(), 0, rank=2)
    future = client.losses(model, 5, [datum()])[1]  # 1 to 4 never come
    body = json.dumps({"request_id": future["request_id"]}).encode()
    for length, sent in (
        (len(body), body),
        (1000, b"{"),
        (1 << 20, loss_request(model, 1, [datum()])),
    ):
        connection = http.client.HTTPConnection(ADDRESS, client.port, timeout=60)
        connection.putrequest("POST", "/api/v1/retrieve_future")
        connection.putheader("X-API-Key", client.key)
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(length))
        connection.endheaders(sent)
        connection.close()
    deadline = time.monotonic() + 30
    while mixed.service.waiters.is_waited_for:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    unloaded = client.asked("unload_model", model_id=model, seq_id=1)
    assert client.result(unloaded)["model_id"] == model
    assert "closed" in client.result(future)["error"]


def test_a_stolen_key_is_of_no_use_once_it_is_revoked(mixed: Running) -> None:
    ledger = mixed.service.ledger
    owner = mixed.client("owner")
    model = owner.new_model(owner.new_session(), 0, rank=2)
    revoke(ledger, "owner")
    refused(owner.losses(model, 1, [datum()]), 401, "X-API-Key")
    refused(owner.send("GET", f"training_runs/{model}"), 401, "X-API-Key")
    again = Client(owner.port, add_tenant(ledger, "owner"))
    assert [
        len(own) for own in logprobs_of(again.result(again.losses(model, 1, [datum()])[1]))
    ] == [4]


def test_all_of_it_left_nothing_behind(mixed: Running, client: Client) -> None:
    """Another trains as ever; nothing waits, and nobody waits for anything."""
    other = mixed.client("afterwards")
    model = other.new_model(other.new_session(), 0, rank=2)
    other.result(other.losses(model, 1, [datum()])[1])
    step = other.asked("optim_step", model_id=model, seq_id=2, adam_params={})
    assert other.result(step)["metrics"]["grad_norm"] > 0
    assert not mixed.crashed
    assert "abusing" not in mixed.service.ledger.waiting_of_tenants()
    assert not mixed.service.waiters.is_waited_for
    assert other.send("POST", "forward_backward", b"\x00" * 100, CONTENT_TYPE)[0] == 400


def test_bodies_of_strangers_and_bodies_that_do_not_come(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = Client(client.port, "tml-none")
    large = b" " * (2 * body_limits.MOST_BYTES_OF_STRANGERS)
    refused(stranger.send("POST", "optim_step", large), 401, "X-API-Key")
    assert client.send("POST", "optim_step", large)[0] == 400
    monkeypatch.setattr(body_limits, "MOST_S", 0.2)
    connection = http.client.HTTPConnection(ADDRESS, client.port, timeout=60)
    connection.putrequest("POST", "/api/v1/optim_step")
    connection.putheader("X-API-Key", client.key)
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 400
    connection.close()


def test_what_is_not_there_is_said(client: Client) -> None:
    status, answer = client.send("GET", "create_model")
    assert (status, answer["detail"].partition(":")[0]) == (404, 'GET "create_model"')
    assert "body: " in client.send("POST", "create_model", b"1")[1]["detail"]
    for path, code, text in (("/nix", 404, "the API is /api/v1"), ("/healthz", 200, '"ok"')):
        connection = http.client.HTTPConnection(ADDRESS, client.port, timeout=60)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert (answer.status, text in answer.read().decode()) == (code, True)
        connection.close()
