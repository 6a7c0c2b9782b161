"""The application: Tinker's API under `/api/v1`, the page, and how what is refused is answered."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from lobra.common.errors import ConfigError, show
from lobra.common.storage import StorageError
from lobra.service.body_limits import BodyLimits
from lobra.service.checkpoint_routes import checkpoint_routes
from lobra.service.intake import Intake
from lobra.service.page_routes import health_routes, page_routes
from lobra.service.refusal import Refusal
from lobra.service.tenants import tenant_of
from lobra.service.training_routes import training_routes
from lobra.service.waiters import Waiters

API = "/api/v1"
log = logging.getLogger(__name__)


def make_app(intake: Intake, waiters: Waiters) -> FastAPI:
    """Return the application."""
    app = FastAPI(title="LobRA-on-DeepSpeed", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.ledger = intake.ledger
    app.add_middleware(BodyLimits, ledger=intake.ledger)

    @app.exception_handler(Refusal)
    def refused(request: Request, error: Refusal) -> Response:
        asks = {"WWW-Authenticate": "Basic"} if error.status == 401 else None
        return JSONResponse({"detail": str(error)}, error.status, asks)

    @app.exception_handler(ConfigError)
    def mistaken(request: Request, error: ConfigError) -> Response:
        return JSONResponse({"detail": str(error)}, 400)

    @app.exception_handler(StorageError)
    def denied(request: Request, error: StorageError) -> Response:
        log.error("%s", error)
        why = "the service cannot write down what is sent, its disk is full or broken"
        return JSONResponse({"detail": f"{why}; try again, or tell its operator"}, 503)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        why = "; ".join(map(_told, error.errors()))
        sender = tenant_of(intake.ledger, request.headers.get("x-api-key", ""))
        match error.body:
            case {"model_id": str(model_id), "seq_id": int(seq_id)} if sender is not None:
                if model_id.isascii():  # as all models' names are, and half a character is not
                    intake.pass_over(sender, model_id, seq_id, why)
        return JSONResponse({"detail": why}, 400)

    app.include_router(page_routes(intake))
    for prefix in ("", API):
        app.include_router(health_routes(intake), prefix=prefix)
    for routes in (training_routes(intake, waiters), checkpoint_routes(intake)):
        app.include_router(routes, prefix=API)

    @app.api_route(f"{API}/{{rest:path}}", methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    def not_offered(rest: str, request: Request) -> Response:
        asked = f"{request.method} {show(rest)}"
        # No 501: the client sends what is answered with 5xx again and again, for minutes.
        return JSONResponse({"detail": f"{asked}: this service does not offer that"}, 404)

    @app.exception_handler(404)
    def not_there(request: Request, error: Exception) -> Response:
        there = f"the page is /, the metrics are /metrics, the API is {API}"
        return JSONResponse({"detail": f"{show(request.url.path)}: there is nothing; {there}"}, 404)

    return app


def _told(mistake: dict[str, Any]) -> str:
    """Return what is wrong with a body, and where in it."""
    *place, last = mistake["loc"][1:] or ["body"]
    if mistake["type"] == "json_invalid":
        return f"body: is no JSON from character {last} on"
    return f"{'.'.join(map(str, [*place, last]))}: {mistake['msg']}"
