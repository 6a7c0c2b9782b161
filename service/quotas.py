"""What tenants may use: tokens a minute, room on disk, and room in the queue."""

from __future__ import annotations

import time

import sqlalchemy as sa

from lobra.service.ledger import Ledger
from lobra.service.refusal import Refusal
from lobra.service.tables import samplers, sessions
from lobra.service.tenants import Tenant

MOST_SESSIONS, MOST_SAMPLERS = 1_000, 20_000  # of a tenant; retention ends the old ones
#: Of a tenant's requests without a result, which are in memory.
MOST_WAITING, MOST_WAITING_BYTES = 10_000, 256 << 20


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
                429,
                f"tenant {tenant.name} may send, and have sampled, {tenant.tokens_per_minute} "
                f"tokens a minute",
            )
        self._tokens[tenant.name] = (left - tokens, now)

    def check_stored(self, tenant: Tenant) -> None:
        """Refuse new data of a tenant that stores all that it may."""
        if tenant.stored_bytes is not None:
            stored_bytes = self.ledger.stored_bytes(tenant.name)
            if stored_bytes >= tenant.stored_bytes:
                raise Refusal(
                    403,
                    f"tenant {tenant.name} stores {stored_bytes:,} bytes, of "
                    f"{tenant.stored_bytes:,}; delete checkpoints, or wait an hour for results to "
                    f"be forgotten",
                )

    def check_sessions(self, tenant: Tenant) -> None:
        """Refuse a new session of a tenant that has as many as it may."""
        self._check_count(tenant, sessions, "sessions", MOST_SESSIONS)

    def check_samplers(self, tenant: Tenant) -> None:
        """Refuse a new sampling session of a tenant that has as many as it may."""
        self._check_count(tenant, samplers, "sampling sessions", MOST_SAMPLERS)

    def _check_count(self, tenant: Tenant, table: sa.Table, what: str, most: int) -> None:
        own = sa.select(sa.func.count()).select_from(table).where(table.c.tenant == tenant.name)
        if (count := self.ledger.number(own)) >= most:
            raise Refusal(
                429,
                f"tenant {tenant.name} has {count:,} {what}, and may have {most:,}; use those "
                f"there are, or wait until some have had their time",
            )

    def check_waiting(self, tenant: Tenant, model_id: str, seq_id: int) -> None:
        """Refuse a request of a tenant that has as many waiting as it may.

        What other requests of its model wait for is taken in however many wait: clients send the
        first part of a batch last.
        """
        count, waiting_bytes = self.ledger.waiting_size(tenant.name)
        if count >= MOST_WAITING or waiting_bytes >= MOST_WAITING_BYTES:
            first = self.ledger.first_waiting(model_id)
            if first is None or seq_id > first:
                raise Refusal(
                    429,
                    f"tenant {tenant.name} has {count:,} requests of {waiting_bytes:,} bytes "
                    f"waiting, of {MOST_WAITING:,} and {MOST_WAITING_BYTES:,}; wait for their "
                    f"results",
                )
