"""A service in this process, and a client that speaks to it in plain HTTP."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lobra.layout.plan import save_plan
from lobra.service.deployment import Deployment, prepare_deployment
from lobra.service.request import ServeRequest
from lobra.service.server import Service
from lobra.service.tenants import add_tenant
from lobra.service.wire import CONTENT_TYPE, MESSAGES, Datum
from tests.trainer.support import make_plan

ADDRESS = "127.0.0.1"


def deployment_of(
    base: Path, state_dir: Path, layouts: list[tuple[Any, ...]], max_tokens: int, **options: Any
) -> Deployment:
    """Return the deployment of a base model, by default on CPU ranks."""
    plan = save_plan(make_plan(layouts, max_tokens), state_dir.with_suffix(".yaml"))
    wanted = {"device": "cpu", "name": "base", **options}
    return prepare_deployment(ServeRequest(str(base), str(plan), state_dir=state_dir, **wanted))


@dataclass
class Running:
    """A service that runs in this process."""

    service: Service
    crashed: list[BaseException] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.service.address.rpartition(":")[2])

    def client(self, tenant: str, **quotas: Any) -> Client:
        """Return a client of a new tenant."""
        return Client(self.port, add_tenant(self.service.ledger, tenant, **quotas))


@contextmanager
def running(deployment: Deployment, **how: Any) -> Iterator[Running]:
    """Serve as long as the block lasts, as `Service.run` does; a crash ends the service only."""
    found = Running(Service(deployment, ADDRESS, 0))
    ready = threading.Event()

    def run() -> None:
        try:
            found.service.run(ready.set, **how)
        except BaseException as error:
            found.crashed.append(error)
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(120)
    try:
        yield found
    finally:
        found.service.stop()
        thread.join(60)
        assert not thread.is_alive()


@dataclass
class Client:
    """A tenant's client: like Tinker's, but every request by hand."""

    port: int
    key: str

    def send(
        self, method: str, route: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, Any]:
        """Return the status and the content of an answer; JSON is read."""
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=120)
        headers = {"X-API-Key": self.key, "Content-Type": kind, "Accept": CONTENT_TYPE}
        connection.request(method, f"/api/v1/{route}", body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content

    def post(self, route: str, **fields: Any) -> tuple[int, Any]:
        """Post JSON."""
        return self.send("POST", route, json.dumps(fields).encode())

    def asked(self, route: str, **fields: Any) -> Any:
        """Post JSON and return the answer, which is no error."""
        status, answer = self.post(route, **fields)
        assert status == 200, answer
        return answer

    def losses(
        self,
        model: str,
        seq_id: int,
        data: Sequence[Datum],
        forward_only: bool = False,
        **more: Any,
    ) -> tuple[int, Any]:
        """Post `forward_backward`."""
        body = loss_request(model, seq_id, data, forward_only=forward_only, **more)
        return self.send("POST", "forward_backward", body, CONTENT_TYPE)

    def result(self, future: dict[str, Any]) -> Any:
        """Wait for a request's result."""
        while True:
            status, answer = self.post("retrieve_future", request_id=future["request_id"])
            if status != 408:
                assert status == 200, answer
                return answer

    def new_model(self, session: str, number: int, **adapter: Any) -> str:
        """Make a model and return its name."""
        future = self.asked(
            "create_model",
            session_id=session,
            model_seq_id=number,
            base_model="base",
            lora_config=adapter,
        )
        return str(self.result(future)["model_id"])

    def new_session(self) -> str:
        """Return the name of a new session."""
        answer = self.asked("create_session", tags=[], user_metadata={}, sdk_version="0")
        return str(answer["session_id"])


def loss_request(model: str, seq_id: int, data: Sequence[Datum], **fields: Any) -> bytes:
    """Return a body of `forward_backward`."""
    message: Any = MESSAGES["ForwardBackwardRequest"](
        **{"model_id": model, "seq_id": seq_id, "loss_fn": "cross_entropy", **fields}
    )
    for datum in data:
        entry = message.data.add()
        entry.model_input.add().encoded_text.tokens = datum.tokens.astype(np.int32).tobytes()
        for name, values, dtype in (
            ("target_tokens", datum.labels.astype(np.int64), 2),
            ("weights", datum.weights.astype(np.float32), 1),
        ):
            tensor = entry.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values.tobytes(), dtype
            tensor.shape.append(len(values))
    content: bytes = message.SerializeToString()
    return content


def logprobs_of(content: bytes) -> list[np.ndarray]:
    """Return each datum's logprobs from a result of `forward_backward`."""
    message: Any = MESSAGES["ForwardBackwardOutput"]()
    message.ParseFromString(content)
    tensor = message.loss_fn_outputs[0].fields["logprobs"]
    ends = np.frombuffer(tensor.offsets, dtype=np.int64) // 4
    return np.split(np.frombuffer(tensor.data, dtype=np.float32), ends[1:-1])
