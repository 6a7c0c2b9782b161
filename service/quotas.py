"""What tenants may use: tokens a minute, models, room on disk, and room in the queue."""

from __future__ import annotations

import time

from lobra.service.ledger import Ledger
from lobra.service.refusal import Refusal
from lobra.service.tenants import Tenant

MOST_WAITING_BYTES = 256 << 20  # of a tenant's requests without a result: they are in memory


class Quotas:
    """Counts what tenants use. Its methods are called by one thread at a time."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._tokens: dict[str, tuple[float, float]] = {}  # of a tenant: left, when (monotonic)

    def spend(self, tenant: Tenant, tokens: int) -> None:
        """Count tokens against a tenant's rate: it may overdraw it once, then has to wait."""
        if tenant.tokens_per_minute is None:
            return
        now = time.monotonic()
        left, since = self._tokens.get(tenant.name, (float(tenant.tokens_per_minute), now))
        gained = (now - since) * tenant.tokens_per_minute / 60.0
        left = min(float(tenant.tokens_per_minute), left + gained)
        if left <= 0:
            raise Refusal(
                429, f"tenant {tenant.name} may send {tenant.tokens_per_minute} tokens a minute"
            )
        self._tokens[tenant.name] = (left - tokens, now)

    def check_models(self, tenant: Tenant, count: int) -> None:
        """Refuse another model of a tenant that has so many open."""
        if count >= tenant.max_models:
            raise Refusal(
                403,
                f"tenant {tenant.name} has {tenant.max_models} models open, which is the most; "
                f"unload one",
            )

    def check_room(self, tenant: Tenant, model_id: str, seq_id: int) -> None:
        """Refuse a request of a tenant that stores, or has waiting, all that it may.

        What other requests of its model wait for is taken in however many wait: clients send the
        first part of a batch last.
        """
        if tenant.stored_bytes is not None:
            stored_bytes = self.ledger.stored_bytes(tenant.name)
            if stored_bytes >= tenant.stored_bytes:
                raise Refusal(
                    403,
                    f"tenant {tenant.name} stores {stored_bytes:,} bytes, of "
                    f"{tenant.stored_bytes:,}; delete checkpoints, or wait an hour for results to "
                    f"be forgotten",
                )
        if self.ledger.waiting_bytes(tenant.name) >= MOST_WAITING_BYTES:
            first = self.ledger.first_waiting(model_id)
            if first is None or seq_id > first:
                raise Refusal(
                    429,
                    f"tenant {tenant.name} has {MOST_WAITING_BYTES:,} bytes of requests waiting, "
                    f"which is the most; wait for their results",
                )
