"""What people and Prometheus see: an operator everything, a tenant its own."""

from __future__ import annotations

import base64
import http.client
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lobra.service.wire import Datum
from tests.service.support import ADDRESS, Client, Running

pytestmark = pytest.mark.ranks


class Checked(HTMLParser):
    """Checks that elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def fetched(client: Client, path: str) -> tuple[int, str]:
    """Return what a browser gets, which sends the key as a password."""
    connection = http.client.HTTPConnection(ADDRESS, client.port, timeout=60)
    coded = base64.b64encode(f"me:{client.key}".encode()).decode()
    connection.request("GET", path, headers={"Authorization": f"Basic {coded}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_an_operator_sees_everybody_and_a_tenant_itself(mixed: Running) -> None:
    operator = mixed.client("operator", is_operator=True)
    clients = [mixed.client(f"seen{number}") for number in range(2)]
    models = []
    for client in clients:
        models.append(client.new_model(client.new_session(), 0, rank=3))
        tokens = np.arange(3, 13, dtype=np.int32)
        data = [Datum(tokens, tokens, np.ones(10))]
        client.result(client.losses(models[-1], 1, data, forward_only=True)[1])
        save = dict(model_id=models[-1], seq_id=2, path="a.b")
        client.result(client.asked("save_weights_for_sampler", **save))
    for who, seen in ((operator, models), (clients[0], models[:1]), (clients[1], models[1:])):
        status, text = fetched(who, "/")
        assert status == 200
        checked = Checked()
        checked.feed(text)
        assert checked.open == []
        assert [model for model in models if model in text] == seen
        assert f"tinker://{seen[0]}/sampler_weights/a.b" in text
        assert ("seen0" in text, "seen1" in text) == tuple(model in seen for model in models)
        assert ("<h2>Replicas</h2>" in text) == (who is operator)
        assert (
            fetched(who, "/live")[1] in text or who is operator
        )  # what others do changes meanwhile
    link = re.search(rf'href="([^"]*{models[0]}[^"]*)"', fetched(clients[0], "/")[1])
    assert link is not None
    status, _ = fetched(clients[1], f"/{link[1]}")
    assert status == 404
    assert operator.send("GET", link[1].removeprefix("api/v1/"))[0] == 200
    assert (
        operator.send("DELETE", link[1].removeprefix("api/v1/").removesuffix("/archive"))[0] == 404
    )
    assert clients[0].send("GET", link[1].removeprefix("api/v1/"))[0] == 200
    assert fetched(Client(operator.port, "tml-none"), "/")[0] == 401


def test_prometheus_can_read_the_metrics(mixed: Running) -> None:
    operator, counted = mixed.client("prometheus", is_operator=True), mixed.client("counted")
    tokens = np.arange(3, 13, dtype=np.int32)
    model = counted.new_model(counted.new_session(), 0, rank=3)
    data = [Datum(tokens, tokens, np.ones(10))]
    counted.result(counted.losses(model, 1, data, forward_only=True)[1])
    assert fetched(mixed.client("curious"), "/metrics")[0] == 403
    status, text = fetched(operator, "/metrics")
    assert status == 200
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]*"\})?', name), line
            samples[name] = float(value)
    assert samples["lobra_slots_used"] >= 1
    assert samples["lobra_passes_total"] > 0
    assert samples['lobra_tokens_total{tenant="counted"}'] == 10
    assert len([name for name in samples if name.startswith("lobra_busy_seconds")]) == 3
