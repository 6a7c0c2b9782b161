"""What is refused, whose things are whose, and what is sent twice: a sentence each, no crash."""

from __future__ import annotations

import base64
import http.client
import json
import time
from typing import Any

import numpy as np
import pytest

from lobra.service import intake
from lobra.service.wire import CONTENT_TYPE, Datum
from tests.service.support import ADDRESS, Client, Running, logprobs_of, loss_request

pytestmark = pytest.mark.ranks

LONGEST = 128  # of the shared service's plan


def datum(length: int = 4, token: int = 5, weight: float = 1.0) -> Datum:
    tokens = np.full(length, token, dtype=np.int32)
    return Datum(tokens, tokens, np.full(length, weight))


@pytest.fixture(scope="module")
def client(mixed: Running) -> Client:
    return mixed.client("asking")


@pytest.fixture(scope="module")
def model(client: Client) -> str:
    return client.new_model(client.new_session(), 0, rank=2)


def refused(answer: tuple[int, Any], status: int, *words: str) -> None:
    assert answer[0] == status, answer
    for word in words:
        assert word in answer[1]["detail"]


def test_a_wrong_key_opens_nothing(mixed: Running, client: Client) -> None:
    for key in ("", "tml-guess", client.key[:-1]):
        refused(Client(client.port, key).post("create_session"), 401, "X-API-Key")


def test_a_tenant_sees_nothing_of_another(mixed: Running, client: Client, model: str) -> None:
    future = client.asked("save_weights", model_id=model, path="mine")
    path = client.result(future)["path"]
    other = mixed.client("other")
    own = other.new_session()
    session = model.partition(":")[0]
    refused(other.post("get_info", model_id=model), 404)
    refused(other.post("optim_step", model_id=model, adam_params={}), 404)
    refused(other.losses(model, 1, [datum()]), 404)
    refused(other.post("session_heartbeat", session_id=session), 404)
    adapter = dict(session_id=session, model_seq_id=9, base_model="base")
    refused(other.post("create_model", **adapter), 404)
    load = dict(session_id=own, model_seq_id=0, path=path, optimizer=True)
    refused(other.post("load_weights", **load), 404)
    refused(other.post("retrieve_future", **{"request_id": future["request_id"]}), 410)
    for method, route in (("GET", ""), ("GET", "/checkpoints/weights/mine/archive")):
        refused(other.send(method, f"training_runs/{model}{route}"), 404)
    refused(other.send("DELETE", f"training_runs/{model}/checkpoints/weights/mine"), 404)
    key = client.key
    connection = http.client.HTTPConnection(ADDRESS, client.port, timeout=60)
    coded = base64.b64encode(f"me:{key}".encode()).decode()
    route = f"/api/v1/training_runs/{model}/checkpoints/weights/mine"
    connection.request("DELETE", route, headers={"Authorization": f"Basic {coded}"})
    assert connection.getresponse().status == 401  # a password reads only
    assert client.send("GET", f"training_runs/{model}")[0] == 200


def test_what_cannot_be_done_is_refused(client: Client, model: str) -> None:
    session = client.new_session()
    make = dict(session_id=session, model_seq_id=0, base_model="base")
    refused(client.post("create_model", **{**make, "base_model": "Qwen"}), 400, "Qwen", "base")
    for rank in (-1, 0, 1000):
        refused(client.post("create_model", **make, lora_config=dict(rank=rank)), 400, "rank")
    nothing = dict(train_attn=False, train_mlp=False, train_unembed=False)
    refused(client.post("create_model", **make, lora_config=nothing), 400, "train_unembed")
    dimuon = dict(type="dimuon")
    refused(client.post("create_model", **make, optimizer_config=dimuon), 400, "optimizer_config")
    adam = dict(beta1=1.0, beta2=-1, eps="x", learning_rate=-1)
    answer = client.post("optim_step", model_id=model, adam_params=adam)
    refused(answer, 400, *adam)
    for name in ("../up", "", "a/b", ".hidden"):
        refused(client.post("save_weights", model_id=model, path=name), 400, "path")
    for path in ("tinker://a/weights/b", "tinker://../weights/b", "/etc/passwd"):
        load = dict(session_id=session, model_seq_id=1, path=path, optimizer=False)
        refused(client.post("load_weights", **load), 404, path)
    for route in ("publish", "create_custom_loss", "checkpoints", "sessions/search"):
        refused(client.post(route), 404, route)


def test_all_that_is_wrong_with_data_is_told(client: Client, model: str) -> None:
    refused(client.send("POST", "forward_backward", b"\xff\xff", CONTENT_TYPE), 400, "protobuf")
    tokens = np.array([1, 2, 256], dtype=np.int32)
    bad = Datum(tokens, tokens[:2], np.array([1.0, np.nan]))
    answer = client.losses(model, 1, [datum(), bad, datum(LONGEST + 1)])
    refused(
        answer, 400, "data[1]", "0 to 255", "one per token: 3", "finite", "data[2]",
        f"{LONGEST + 1} tokens", f"{LONGEST} that any replica",
    )  # fmt: skip
    many = b"0" * (33 << 20)
    refused(client.send("POST", "forward_backward", many, CONTENT_TYPE), 413, "bytes")
    refused(client.losses(model, 1, []), 400, "data: is empty")
    refused(client.losses(model, 1, [datum()], loss_fn="dro"), 400, '"dro"', "cross_entropy")
    refused(client.losses(model, 1, [datum()], loss_fn="ppo"), 400, "weights", "advantages")
    refused(client.losses(model, 0, [datum()]), 400, "seq_id 0")
    body = loss_request(model, 1, [datum()])
    refused(client.send("POST", "forward_backward", body[:-3], CONTENT_TYPE), 400)


def test_a_request_that_is_sent_twice_is_carried_out_once(client: Client) -> None:
    model = client.new_model(client.new_session(), 0, rank=2)
    sent = [client.losses(model, 1, [datum()])[1] for _ in range(3)]
    sent += [client.losses(model, 1, [datum(9)])[1]]  # another body does not change it
    assert len({future["request_id"] for future in sent}) == 1
    assert [len(own) for own in logprobs_of(client.result(sent[0]))] == [4]
    step = dict(model_id=model, seq_id=2, adam_params=dict(learning_rate=0.1))
    steps = [client.asked("optim_step", **step) for _ in range(2)]
    assert client.result(steps[0]) == client.result(steps[1])
    (after,) = logprobs_of(client.result(client.losses(model, 3, [datum()], True)[1]))
    (again,) = logprobs_of(client.result(client.losses(model, 4, [datum()], True)[1]))
    np.testing.assert_array_equal(after, again)
    session, number = model.split(":train:")
    make = dict(session_id=session, model_seq_id=int(number), base_model="base")
    assert client.result(client.asked("create_model", **make))["model_id"] == model


def test_requests_of_a_model_wait_for_those_before(client: Client) -> None:
    model = client.new_model(client.new_session(), 0, rank=2)
    early = client.losses(model, 2, [datum()])[1]
    time.sleep(0.2)
    assert client.send("GET", f"training_runs/{model}")[0] == 200
    first = client.losses(model, 1, [datum(7)])[1]
    assert [len(own) for own in logprobs_of(client.result(early))] == [4]
    assert [len(own) for own in logprobs_of(client.result(first))] == [7]


def test_what_is_not_finite_is_its_tenants_alone(mixed: Running) -> None:
    """Rates beyond all bounds spoil one adapter at most; another in the same passes learns on.

    Of 1e308 the update itself fails, of 1e300 the gradient after it is not finite (in fp64).
    """
    rates = (1e308, 1e300, 1e-2)
    clients = [mixed.client(f"rate{number}") for number in range(len(rates))]
    models = [client.new_model(client.new_session(), 0, rank=2, seed=3) for client in clients]
    results: list[list[Any]] = [[], [], []]
    for step in range(3):
        for client, model, rate, own in zip(clients, models, rates, results, strict=True):
            loss = client.losses(model, 2 * step + 1, [datum(20, 6)])[1]
            adam = dict(learning_rate=rate)
            update = dict(model_id=model, seq_id=2 * step + 2, adam_params=adam)
            own += [loss, client.asked("optim_step", **update)]
    failing, spoilt, fine = (
        [client.result(f) for f in own] for client, own in zip(clients, results, strict=True)
    )
    assert all("the update failed" in update["error"] for update in failing[1::2])
    before, after = (logprobs_of(content)[0] for content in (failing[0], failing[4]))
    np.testing.assert_array_equal(before, after)
    assert "not finite" in spoilt[-1]["error"]
    assert spoilt[-1]["category"] == failing[-1]["category"] == "user"
    means = [logprobs_of(content)[0].mean() for content in fine[::2]]
    assert means[0] < means[1] < means[2]


def test_what_cannot_be_sampled_is_refused(mixed: Running, client: Client) -> None:
    session = client.new_session()
    make = dict(session_id=session, sampling_session_seq_id=0, base_model="base")
    sampler = client.asked("create_sampling_session", **make)["sampling_session_id"]
    refused(client.post("create_sampling_session", **{**make, "base_model": "Qwen"}), 400, "Qwen")
    other = mixed.client("listening")
    refused(other.send("GET", f"samplers/{sampler}"), 404)
    refused(other.post("create_sampling_session", **make), 404)

    def asked(by: Client, tokens: list[int], max_tokens: int = 4) -> tuple[int, Any]:
        chunks = [dict(type="encoded_text", tokens=tokens)]
        params = dict(max_tokens=max_tokens)
        return by.post(
            "asample", sampling_session_id=sampler, seq_id=0, prompt=dict(chunks=chunks),
            sampling_params=params,
        )  # fmt: skip

    refused(asked(other, [5, 6]), 404, "sampler")
    longest = mixed.service.deployment.max_context
    for tokens in ([], [5, 256], [-1, 5]):
        refused(asked(client, tokens), 400, "from 0 to 255")
    refused(asked(client, [5] * (longest - 3)), 400, f"{longest - 3} tokens", f"{longest} that")
    assert asked(client, [5, 6])[0] == 200


def test_quotas_are_kept(mixed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mixed.client("small", tokens_per_minute=10, max_models=1)
    session = client.new_session()
    model = client.new_model(session, 0, rank=1)
    make = dict(session_id=session, model_seq_id=1, base_model="base")
    refused(client.post("create_model", **make), 403, "1 models open", "may have 1")
    assert client.losses(model, 1, [datum(30)])[0] == 200
    refused(client.losses(model, 2, [datum(1)]), 429, "10 tokens a minute")
    client.result(client.asked("unload_model", model_id=model))
    assert client.new_model(session, 1, rank=1) == f"{session}:train:1"
    refused(client.post("optim_step", model_id=model, adam_params={}), 400, "closed")
    monkeypatch.setattr(intake, "SESSION_LIFE_S", 0.0)  # a session that ended is not counted
    assert client.new_model(client.new_session(), 0, rank=1)
    refused(client.post("optim_step", model_id=f"{session}:train:1", adam_params={}), 400, "closed")


def test_samples_are_charged_as_long_as_they_may_be(mixed: Running) -> None:
    """With their prompts, when they are accepted: who asks for many at once has none for free."""
    client = mixed.client("drawing-much", tokens_per_minute=100)
    make = dict(session_id=client.new_session(), sampling_session_seq_id=0, base_model="base")
    sampler = client.asked("create_sampling_session", **make)["sampling_session_id"]

    def asked(seq_id: int, max_tokens: int) -> tuple[int, Any]:
        return client.post(
            "asample", sampling_session_id=sampler, seq_id=seq_id, num_samples=2,
            prompt=dict(chunks=[dict(tokens=[5, 6])]), sampling_params=dict(max_tokens=max_tokens),
        )  # fmt: skip

    assert [asked(0, 18)[0], asked(1, 38)[0]] == [200, 200]  # 40 and 80 tokens
    refused(asked(2, 1), 429, "100 tokens a minute")
    assert asked(1, 38)[0] == 200, "the same request is charged once"


def test_checkpoints_are_listed_fetched_and_deleted(client: Client, model: str) -> None:
    for route, name in (("save_weights", "a"), ("save_weights_for_sampler", "b")):
        note = dict(user_metadata=dict(by="me"), ttl_seconds=3600)
        client.result(client.asked(route, model_id=model, path=name, **note))
    again = client.result(client.asked("save_weights", model_id=model, path="a"))
    assert "overwrite" in again["error"]
    overwritten = client.asked("save_weights", model_id=model, path="a", overwrite=True)
    path = client.result(overwritten)["path"]
    assert path == f"tinker://{model}/weights/a"
    run = client.send("GET", f"training_runs/{model}")[1]
    assert (run["lora_rank"], run["last_checkpoint"]["checkpoint_id"]) == (2, "weights/a")
    rows = client.send("GET", f"training_runs/{model}/checkpoints")[1]["checkpoints"]
    assert {"weights/a", "sampler_weights/b"} <= {row["checkpoint_id"] for row in rows}
    assert client.asked("weights_info", tinker_path=path)["lora_rank"] == 2
    status, content = client.send("GET", f"training_runs/{model}/checkpoints/weights/a/archive")
    assert (status, b"adapter_model.safetensors" in content) == (200, True)
    deleted = f"training_runs/{model}/checkpoints/weights/a"
    assert client.send("DELETE", deleted)[0] == 204
    refused(client.send("DELETE", deleted), 404)


def test_runs_checkpoints_and_sessions_are_listed_page_by_page(mixed: Running) -> None:
    client = mixed.client("listing")
    session = client.new_session()
    models = [client.new_model(session, number, rank=1) for number in range(3)]
    for model in models[:2]:
        client.result(client.asked("save_weights", model_id=model, path="a"))
    status, answer = client.send("GET", "training_runs?limit=2&offset=1&access_scope=owned")
    assert status == 200
    assert [run["training_run_id"] for run in answer["training_runs"]] == [models[1], models[0]]
    assert answer["training_runs"][0]["last_checkpoint"]["checkpoint_id"] == "weights/a"
    assert answer["cursor"] == {"offset": 1, "limit": 2, "total_count": 3}
    paths = [f"tinker://{model}/weights/a" for model in models[:2]]
    listed = client.send("GET", "checkpoints")[1]["checkpoints"]
    assert [row["tinker_path"] for row in listed] == paths[::-1]
    assert client.send("GET", "sessions")[1]["sessions"] == [session]
    assert client.send("GET", f"sessions/{session}")[1]["training_run_ids"] == models
    refused(client.send("GET", "training_runs?limit=0"), 400, "limit")
    other = mixed.client("reading")
    assert other.send("GET", "checkpoints")[1]["checkpoints"] == []
    refused(other.send("GET", f"sessions/{session}"), 404)
    refused(other.send("POST", f"sessions/{session}/finish"), 404)
    life = f"training_runs/{models[0]}/checkpoints/weights/a/ttl"
    for seconds, expires in ((3600, True), (None, False)):
        body = json.dumps({"ttl_seconds": seconds}).encode()
        assert client.send("PUT", life, body)[0] == 204
        row = mixed.service.ledger.checkpoint(paths[0])
        assert row is not None and (row.expires_at is not None) == expires
        refused(other.send("PUT", life, body), 404)
    assert client.send("POST", f"sessions/{session}/finish")[0] == 204
    full = mixed.client("finishing", max_models=1)
    session = full.new_session()
    full.new_model(session, 0, rank=1)
    full.send("POST", f"sessions/{session}/finish")
    deadline = time.monotonic() + 30
    while mixed.service.ledger.models_of("finishing"):
        assert time.monotonic() < deadline
    assert full.new_model(full.new_session(), 0, rank=1)


def test_what_is_refused_holds_up_nothing_after_it(mixed: Running) -> None:
    """A client has used up the number, and does not send it again."""
    client = mixed.client("refused")
    model = client.new_model(client.new_session(), 0, rank=2)
    refused(client.losses(model, 1, [datum(LONGEST + 1)]), 400, f"has {LONGEST + 1} tokens")
    refused(client.losses(model, 2, [datum()], loss_fn="cispo"), 400, "cispo")
    own = dict(model_id=model)
    refused(client.post("optim_step", seq_id=3, adam_params=dict(eps=-1), **own), 400, "eps")
    refused(client.post("save_weights", seq_id=4, path="../a", **own), 400, "path")
    refused(client.post("save_weights_for_sampler", seq_id=5, **own), 400, "path: is missing")
    load = dict(seq_id=6, path="tinker://nix/weights/a", optimizer=False, **own)
    refused(client.post("load_weights", **load), 404, "nix")
    loss = client.losses(model, 7, [datum()])[1]
    update = client.asked("optim_step", seq_id=8, adam_params={}, **own)
    assert [len(found) for found in logprobs_of(client.result(loss))] == [4]
    assert client.result(update)["metrics"]["grad_norm"] > 0
    other = mixed.client("meddling")
    refused(other.post("optim_step", seq_id=9, adam_params=dict(eps=-1), **own), 400, "eps")
    step = client.asked("optim_step", seq_id=9, adam_params={}, **own)
    assert "metrics" in client.result(step), "nobody else takes its numbers"
