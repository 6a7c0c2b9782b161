"""The routes of Tinker's API.

What is asked of a model is answered with a name to ask for the result by, once it is in the ledger.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import tarfile
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.middleware.base import RequestResponseEndpoint

from lobra.common.errors import ConfigError
from lobra.service.backlog import LOSS_KINDS
from lobra.service.bodies import (
    Body,
    CreateModel,
    CreateSampler,
    LoadWeights,
    OfModel,
    OfSession,
    OptimStep,
    RetrieveFuture,
    Sample,
    SaveForSampler,
    SaveWeights,
)
from lobra.service.coordinator import SAMPLER_WEIGHTS, WEIGHTS
from lobra.service.deployment import PATH_PREFIX
from lobra.service.intake import MLP, Intake, Refusal
from lobra.service.ledger import SAMPLE, CheckpointRow, RequestRow
from lobra.service.page import page
from lobra.service.tally import as_prometheus
from lobra.service.tenants import Tenant, tenant_of
from lobra.service.waiters import Waiters
from lobra.service.wire import CONTENT_TYPE
from lobra.tasks.target_modules import HEAD

API = "/api/v1"
MOST_CHECKPOINTS = 50  # that the page shows
MOST_BODY_BYTES = 32 << 20  # the client sends 5 MB at most
POLL_S = 30.0  # how long a question for a result is held
KINDS = {WEIGHTS: "training", SAMPLER_WEIGHTS: "sampler"}


def _sender(
    request: Request,
    x_api_key: Annotated[str, Header()] = "",
    authorization: Annotated[str, Header()] = "",
) -> Tenant:
    """Return the tenant who sent a request; browsers send the key as a password."""
    found = tenant_of(request.app.state.ledger, x_api_key or _password(authorization))
    if found is None:
        raise Refusal(401, "X-API-Key: is no key of this service; lobra keys add makes one")
    return found


def _password(authorization: str) -> str:
    """Return the password of HTTP's basic authentication, "" if there is none."""
    kind, _, coded = authorization.partition(" ")
    try:
        plain = base64.b64decode(coded, validate=True).decode() if kind == "Basic" else ""
    except ValueError:
        return ""
    return plain.partition(":")[2]


Sender = Annotated[Tenant, Depends(_sender)]


def make_app(intake: Intake, waiters: Waiters) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="LobRA-on-DeepSpeed", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.ledger = ledger = intake.ledger
    deployment = intake.deployment

    @app.middleware("http")
    async def bounded(request: Request, go_on: RequestResponseEndpoint) -> Response:
        size = request.headers.get("content-length", "0")
        is_chunked = "transfer-encoding" in request.headers
        if is_chunked or not size.isdecimal() or int(size) > MOST_BODY_BYTES:
            text = f"want a body of a known length, at most {MOST_BODY_BYTES:,} bytes"
            return JSONResponse({"detail": text}, 413)
        return await go_on(request)

    @app.exception_handler(Refusal)
    def refused(request: Request, error: Refusal) -> Response:
        asks = {"WWW-Authenticate": "Basic"} if error.status == 401 else None
        return JSONResponse({"detail": str(error)}, error.status, asks)

    @app.exception_handler(ConfigError)
    def mistaken(request: Request, error: ConfigError) -> Response:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        found = [f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors()]
        return JSONResponse({"detail": "; ".join(found)}, 400)

    # -- what people and Prometheus see ---------------------------------------------------------

    @app.get("/")
    def overview(sender: Sender) -> Response:
        shown = None if sender.is_operator else sender.name
        coordinator = intake.coordinator
        content = page(
            deployment,
            coordinator.tally,
            ledger.models_of(shown),
            ledger.last_checkpoints(shown, MOST_CHECKPOINTS),
            ledger.waiting(shown) if shown is None else {shown: 0, **ledger.waiting(shown)},
            frozenset(coordinator.seats),
        )
        return Response(content, media_type="text/html")

    @app.get("/metrics")
    def metrics(sender: Sender) -> Response:
        if not sender.is_operator:
            raise Refusal(403, f"tenant {sender.name} is no operator; lobra keys add --operator")
        coordinator = intake.coordinator
        text = as_prometheus(coordinator.tally, ledger.waiting(None), len(coordinator.seats))
        return Response(text, media_type="text/plain; version=0.0.4")

    # -- connecting -----------------------------------------------------------------------------

    @app.get(f"{API}/healthz")
    def health() -> dict[str, Any]:
        return {"status": "ok"}

    @app.get(f"{API}/get_server_capabilities")
    def capabilities(sender: Sender) -> dict[str, Any]:
        name, longest = deployment.names[0], deployment.run.plan.max_tokens
        model = {"model_name": name, "max_context_length": longest, "trainable": True}
        return {"supported_models": [{**model, "sampleable": True}]}

    @app.post(f"{API}/client/config")
    @app.post(f"{API}/client/dynamic_config")
    def config(sender: Sender) -> dict[str, Any]:
        return {}

    @app.post(f"{API}/telemetry")
    def telemetry() -> dict[str, Any]:
        return {"status": "accepted"}

    @app.post(f"{API}/create_session")
    def create_session(sender: Sender) -> dict[str, Any]:
        name = intake.new_session(sender)
        return {"type": "create_session", "session_id": name}

    @app.post(f"{API}/session_heartbeat")
    def heartbeat(body: OfSession, sender: Sender) -> dict[str, Any]:
        intake.heartbeat(sender, body.session_id)
        return {"type": "session_heartbeat"}

    # -- training -------------------------------------------------------------------------------

    @app.post(f"{API}/create_model")
    def create_model(body: CreateModel, sender: Sender) -> dict[str, Any]:
        return _future(intake.create_model(sender, body))

    @app.post(f"{API}/load_weights")
    def load_weights(body: LoadWeights, sender: Sender) -> dict[str, Any]:
        return _future(intake.load_weights(sender, body))

    @app.post(f"{API}/get_info")
    def get_info(body: OfModel, sender: Sender) -> dict[str, Any]:
        model, name = intake.model(sender, body.model_id), deployment.names[0]
        data = {"model_name": name, "tokenizer_id": name}
        return {
            "type": "get_info",
            "model_id": model.id,
            "model_data": data,
            "model_name": name,
            "is_lora": True,
            "lora_rank": model.rank,
        }

    @app.post(f"{API}/forward_backward")
    async def forward_backward(request: Request, sender: Sender) -> dict[str, Any]:
        body = await request.body()

        def submit() -> RequestRow:
            content = deployment.read_loss_request(body)
            if content.seq_id < 1:
                raise Refusal(400, f"seq_id {content.seq_id}: want at least 1")
            kind = LOSS_KINDS[content.forward_only]
            return intake.submit(sender, content.model_id, content.seq_id, kind, body, content)

        return _future(await run_in_threadpool(submit))

    def submit(sender: Tenant, kind: str, body: OfModel) -> dict[str, Any]:
        content = body.model_dump_json().encode()
        row = intake.submit(sender, body.model_id, body.seq_id, kind, content, body.model_dump())
        return _future(row)

    @app.post(f"{API}/optim_step")
    def optim_step(body: OptimStep, sender: Sender) -> dict[str, Any]:
        return submit(sender, "optim_step", body)

    @app.post(f"{API}/save_weights")
    def save_weights(body: SaveWeights, sender: Sender) -> dict[str, Any]:
        return submit(sender, "save_weights", body)

    @app.post(f"{API}/save_weights_for_sampler")
    def save_weights_for_sampler(body: SaveForSampler, sender: Sender) -> dict[str, Any]:
        if body.path is None and body.sampling_session_seq_id is None:
            raise Refusal(400, "path: is missing")
        return submit(sender, "save_weights_for_sampler", body)

    @app.post(f"{API}/unload_model")
    def unload_model(body: OfModel, sender: Sender) -> dict[str, Any]:
        return submit(sender, "unload_model", body)

    @app.post(f"{API}/retrieve_future")
    async def retrieve_future(body: RetrieveFuture, sender: Sender) -> Response:
        event = waiters.expect(body.request_id)  # first: it may be finished before we look
        try:
            row = await run_in_threadpool(intake.request, sender, body.request_id)
            if row.finished_at is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), POLL_S)
                row = await run_in_threadpool(intake.request, sender, body.request_id)
        finally:
            waiters.forget(body.request_id, event)
        return _result(row)

    # -- sampling -------------------------------------------------------------------------------

    @app.post(f"{API}/create_sampling_session")
    def create_sampling_session(body: CreateSampler, sender: Sender) -> dict[str, Any]:
        name = intake.new_sampler(sender, body)
        return {"type": "create_sampling_session", "sampling_session_id": name}

    @app.get(f"{API}/samplers/{{sampler_id}}")
    def sampler(sampler_id: str, sender: Sender) -> dict[str, Any]:
        row = intake.sampler(sender, sampler_id)
        names = {"sampler_id": row.id, "base_model": deployment.names[0]}
        return {**names, "model_path": row.path or None}

    @app.post(f"{API}/asample")
    def asample(body: Sample, sender: Sender) -> dict[str, Any]:
        row = intake.sample(sender, body)
        names = [f"{row.id}:{number}" for number in range(body.num_samples)]
        return {"request_id": row.id, "sample_sequence_ids": names}

    @app.post(f"{API}/cancel_future")
    def cancel_future(body: RetrieveFuture, sender: Sender) -> dict[str, Any]:
        intake.request(sender, body.request_id)  # it is carried out all the same
        return {}

    # -- what is left behind --------------------------------------------------------------------

    @app.get(f"{API}/training_runs/{{model_id}}")
    def training_run(model_id: str, sender: Sender) -> dict[str, Any]:
        model = intake.model(sender, model_id)
        last = {row.kind: _checkpoint(row) for row in ledger.checkpoints_of(model_id)}
        return {
            "training_run_id": model.id,
            "base_model": deployment.names[0],
            "model_owner": model.tenant,
            "is_lora": True,
            "lora_rank": model.rank,
            "last_request_time": _date(ledger.last_arrival(model_id) or model.created_at),
            "last_checkpoint": last.get(WEIGHTS),
            "last_sampler_checkpoint": last.get(SAMPLER_WEIGHTS),
            "user_metadata": model.user_metadata,
        }

    @app.get(f"{API}/training_runs/{{model_id}}/checkpoints")
    def list_checkpoints(model_id: str, sender: Sender) -> dict[str, Any]:
        rows = ledger.checkpoints_of(intake.model(sender, model_id).id)
        return {"checkpoints": [_checkpoint(row) for row in rows]}

    @app.delete(f"{API}/training_runs/{{model_id}}/checkpoints/{{kind}}/{{name}}")
    def delete_checkpoint(model_id: str, kind: str, name: str, sender: Sender) -> Response:
        row = intake.checkpoint(sender, f"{PATH_PREFIX}{model_id}/{kind}/{name}")
        deployment.drop_checkpoint(ledger, row)
        return Response(status_code=204)

    @app.get(f"{API}/training_runs/{{model_id}}/checkpoints/{{kind}}/{{name}}/archive")
    def archive(model_id: str, kind: str, name: str, sender: Sender) -> Response:
        row = intake.checkpoint(sender, f"{PATH_PREFIX}{model_id}/{kind}/{name}")
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            tar.add(deployment.folder_of(row.path), arcname=name)
        return Response(content.getvalue(), media_type="application/x-tar")

    @app.post(f"{API}/weights_info")
    def weights_info(body: WeightsInfo, sender: Sender) -> dict[str, Any]:
        model = intake.model(sender, intake.checkpoint(sender, body.tinker_path).model_id)
        return {
            "base_model": deployment.names[0],
            "is_lora": True,
            "lora_rank": model.rank,
            "train_unembed": HEAD in model.target_modules,
            "train_mlp": MLP[0] in model.target_modules,
            "train_attn": "q_proj" in model.target_modules,
        }

    @app.api_route(f"{API}/{{rest:path}}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    def not_offered(rest: str) -> Response:
        return JSONResponse({"detail": f"{rest}: this service does not offer that"}, 501)

    return app


class WeightsInfo(Body):
    """A checkpoint is asked about."""

    tinker_path: str


def _future(row: RequestRow) -> dict[str, Any]:
    return {"request_id": row.id, "model_id": row.model_id}


def _result(row: RequestRow) -> Response:
    """Return the answer to a question for a request's result."""
    if row.finished_at is None:
        return JSONResponse({"queue_state": "active"}, 408)
    if row.error is not None:
        return JSONResponse({"error": row.error, "category": "user"})
    kind = CONTENT_TYPE if row.kind in (*LOSS_KINDS, SAMPLE) else "application/json"
    return Response(row.result, media_type=kind)


def _checkpoint(row: CheckpointRow) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": KINDS[row.kind],
        "time": _date(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "user_metadata": row.user_metadata,
        "expires_at": None if row.expires_at is None else _date(row.expires_at),
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
