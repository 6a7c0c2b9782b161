"""The routes for people and for Prometheus: the page, what changes on it, the metrics."""

from __future__ import annotations

import base64
import hashlib

from fastapi import APIRouter, Response

from lobra.service.intake import Intake
from lobra.service.page import SCRIPT, ModelLine, TenantLine, View, page, sections
from lobra.service.refusal import Refusal
from lobra.service.sender import Sender
from lobra.service.tables import ModelRow
from lobra.service.tally import as_prometheus
from lobra.service.tenants import Tenant, all_tenants

MOST_CHECKPOINTS, MOST_LOSSES = 50, 200  # that are shown, the latter of a model
_SCRIPT_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
#: Nothing runs on the page but its own script, which may ask its own service only.
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_SCRIPT_HASH}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def page_routes(intake: Intake) -> APIRouter:
    """Return the routes."""
    routes = APIRouter()

    @routes.get("/")
    def overview(sender: Sender) -> Response:
        return _html(page(intake.coordinator.deployment, view_of(intake, sender)))

    @routes.get("/live")
    def live(sender: Sender) -> Response:
        return _html(sections(intake.coordinator.deployment, view_of(intake, sender)))

    @routes.get("/metrics")
    def metrics(sender: Sender) -> Response:
        if not sender.is_operator:
            raise Refusal(403, f"tenant {sender.name} is no operator; lobra keys add --operator")
        coordinator = intake.coordinator
        waiting, slots = intake.ledger.waiting_of_tenants(), len(coordinator.seats.taken)
        ranks = 0 if coordinator.missing_ranks else intake.coordinator.deployment.run.world_size
        text = as_prometheus(coordinator.tally.view(), waiting, slots, ranks)
        return Response(text, media_type="text/plain; version=0.0.4")

    return routes


def health_routes(intake: Intake) -> APIRouter:
    """Return the route of programs that look whether the service is well."""
    routes = APIRouter()

    @routes.get("/healthz")
    def health() -> dict[str, str]:
        return {"status": "waiting for ranks" if intake.coordinator.missing_ranks else "ok"}

    return routes


def view_of(intake: Intake, sender: Tenant) -> View:
    """Return what a tenant is shown: an operator everything, others their own."""
    ledger, coordinator = intake.ledger, intake.coordinator
    why, whole = coordinator.missing_ranks, intake.deployment.run.plan
    activity, seated = coordinator.tally.view(), frozenset(coordinator.seats.taken)
    shown = None if sender.is_operator else sender.name
    models, waiting = ledger.models_of(shown), ledger.waiting(shown)
    requests = ledger.waiting_of_tenants()

    def line_of(tenant: Tenant) -> TenantLine:
        own = {model.id for model in models if model.tenant == tenant.name}
        return TenantLine(
            tenant,
            requests.get(tenant.name, 0),
            len(own),
            len(own & seated),
            activity.tokens.get(tenant.name, 0),
            ledger.stored_bytes(tenant.name),
        )

    def model_line(row: ModelRow) -> ModelLine:
        place = "on the ranks" if row.id in seated else "at rest"
        if row.id in coordinator.seats.wanted:
            place = "waits for a slot"
        losses = ledger.losses_of(row.id, MOST_LOSSES)
        return ModelLine(row, place, waiting.get(row.id, 0), losses)

    return View(
        [line_of(one) for one in (all_tenants(ledger) if sender.is_operator else [sender])],
        [model_line(row) for row in models],
        ledger.last_checkpoints(shown, MOST_CHECKPOINTS),
        activity if sender.is_operator else None,
        why if why is None or sender.is_operator else "they are started",
        None if coordinator.deployment.run.plan == whole else whole,
    )


def _html(text: str) -> Response:
    return Response(text, media_type="text/html", headers=HEADERS)
