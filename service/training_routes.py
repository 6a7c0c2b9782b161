"""The routes of training and sampling: sessions, models, futures.

What is asked of a model is answered with a name to ask for the result by, once it is in the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from lobra.service.backlog import LOSS_KINDS
from lobra.service.bodies import (
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
from lobra.service.checkpoint_routes import Limit, Offset
from lobra.service.intake import Intake
from lobra.service.refusal import Refusal
from lobra.service.sender import Sender
from lobra.service.tables import SAMPLE, USER, RequestRow, sessions
from lobra.service.tenants import Tenant
from lobra.service.waiters import Waiters
from lobra.service.wire import CONTENT_TYPE, loss_message

POLL_S = 30.0  # how long a question for a result is held


def training_routes(intake: Intake, waiters: Waiters) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()
    deployment = intake.deployment

    # -- connecting -----------------------------------------------------------------------------

    @routes.get("/get_server_capabilities")
    def capabilities(sender: Sender) -> dict[str, Any]:
        name, longest = deployment.names[0], deployment.run.plan.max_tokens
        model = {"model_name": name, "max_context_length": longest, "trainable": True}
        return {"supported_models": [{**model, "sampleable": True}]}

    @routes.post("/client/config")
    @routes.post("/client/dynamic_config")
    def config(sender: Sender) -> dict[str, Any]:
        return {}

    @routes.post("/telemetry")
    def telemetry() -> dict[str, Any]:
        return {"status": "accepted"}

    @routes.post("/create_session")
    def create_session(sender: Sender) -> dict[str, Any]:
        name = intake.new_session(sender)
        return {"type": "create_session", "session_id": name}

    @routes.post("/session_heartbeat")
    def heartbeat(body: OfSession, sender: Sender) -> dict[str, Any]:
        intake.heartbeat(sender, body.session_id)
        return {"type": "session_heartbeat"}

    @routes.get("/sessions")
    def list_sessions(sender: Sender, limit: Limit = 20, offset: Offset = 0) -> dict[str, Any]:
        rows, _ = intake.ledger.listed(sessions, sender.name, limit, offset)
        return {"sessions": [row["id"] for row in rows]}

    @routes.get("/sessions/{session_id}")
    def session(session_id: str, sender: Sender) -> dict[str, Any]:
        intake.check_session(sender, session_id)
        own_models, own_samplers = intake.ledger.of_session(session_id)
        return {"training_run_ids": own_models, "sampler_ids": own_samplers}

    @routes.post("/sessions/{session_id}/finish")
    def finish_session(session_id: str, sender: Sender) -> Response:
        intake.finish_session(sender, session_id)
        return Response(status_code=204)

    # -- training -------------------------------------------------------------------------------

    @routes.post("/create_model")
    def create_model(body: CreateModel, sender: Sender) -> dict[str, Any]:
        return _future(intake.create_model(sender, body))

    @routes.post("/load_weights")
    def load_weights(body: LoadWeights, sender: Sender) -> dict[str, Any]:
        with intake.passing_over(sender, body.model_id, body.seq_id):
            return _future(intake.load_weights(sender, body))

    @routes.post("/get_info")
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

    @routes.post("/forward_backward")
    async def forward_backward(request: Request, sender: Sender) -> dict[str, Any]:
        body = await request.body()

        def submit() -> RequestRow:
            message = loss_message(body)
            model_id, seq_id = message.model_id, message.seq_id
            if seq_id < 1:
                raise Refusal(400, f"seq_id {seq_id}: want at least 1")
            with intake.passing_over(sender, model_id, seq_id):
                content = deployment.read_loss_request(message)
                kind = LOSS_KINDS[content.forward_only]
                return intake.submit(sender, model_id, seq_id, kind, body, content)

        return _future(await run_in_threadpool(submit))

    def submit(sender: Tenant, kind: str, body: OfModel) -> dict[str, Any]:
        content = body.model_dump_json().encode()
        with intake.passing_over(sender, body.model_id, body.seq_id):
            fields = body.model_dump()
            return _future(intake.submit(sender, body.model_id, body.seq_id, kind, content, fields))

    @routes.post("/optim_step")
    def optim_step(body: OptimStep, sender: Sender) -> dict[str, Any]:
        return submit(sender, "optim_step", body)

    @routes.post("/save_weights")
    def save_weights(body: SaveWeights, sender: Sender) -> dict[str, Any]:
        return submit(sender, "save_weights", body)

    @routes.post("/save_weights_for_sampler")
    def save_weights_for_sampler(body: SaveForSampler, sender: Sender) -> dict[str, Any]:
        return submit(sender, "save_weights_for_sampler", body)

    @routes.post("/unload_model")
    def unload_model(body: OfModel, sender: Sender) -> dict[str, Any]:
        return submit(sender, "unload_model", body)

    @routes.post("/retrieve_future")
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

    @routes.post("/cancel_future")
    def cancel_future(body: RetrieveFuture, sender: Sender) -> dict[str, Any]:
        intake.request(sender, body.request_id)  # it is carried out all the same
        return {}

    # -- sampling -------------------------------------------------------------------------------

    @routes.post("/create_sampling_session")
    def create_sampling_session(body: CreateSampler, sender: Sender) -> dict[str, Any]:
        name = intake.new_sampler(sender, body)
        return {"type": "create_sampling_session", "sampling_session_id": name}

    @routes.get("/samplers/{sampler_id}")
    def sampler(sampler_id: str, sender: Sender) -> dict[str, Any]:
        row = intake.sampler(sender, sampler_id)
        names = {"sampler_id": row.id, "base_model": deployment.names[0]}
        return {**names, "model_path": row.path or None}

    @routes.post("/asample")
    def asample(body: Sample, sender: Sender) -> dict[str, Any]:
        row = intake.sample(sender, body)
        names = [f"{row.id}:{number}" for number in range(body.num_samples)]
        return {"request_id": row.id, "sample_sequence_ids": names}

    return routes


def _future(row: RequestRow) -> dict[str, Any]:
    return {"request_id": row.id, "model_id": row.model_id}


def _result(row: RequestRow) -> Response:
    """Return the answer to a question for a request's result."""
    if row.finished_at is None:
        return JSONResponse({"queue_state": "active"}, 408)
    if row.error is not None:
        return JSONResponse({"error": row.error, "category": row.category or USER})
    kind = CONTENT_TYPE if row.kind in (*LOSS_KINDS, SAMPLE) else "application/json"
    return Response(row.result, media_type=kind)
