"""Tenants and their keys; of a key only its SHA-256 is kept, which is enough for a random one."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from lobra.common.errors import ConfigError
from lobra.service.ledger import Ledger
from lobra.service.tables import tenants

KEY_PREFIX = "tml-"  # Tinker's client takes no other
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEFAULT_MAX_MODELS = 8


@dataclass(frozen=True)
class Tenant:
    """Who trains: a name, and what it may use.

    Attributes
    ----------
    name
        Unique.
    created_at
        Seconds since the epoch.
    tokens_per_minute
        Tokens it may send, or have sampled, in a minute; None: any number.
    stored_bytes
        What its checkpoints and requests may take on disk; None: any size.
    slots
        Its models that may be on the ranks at once; None: all.
    max_models
        Models it may have open at once.
    keep_days
        How long its checkpoints are kept that do not say so, and its models that nobody asks for;
        None: for ever.
    is_operator
        Whether the page shows it everybody's models, not its own only.
    """

    name: str
    created_at: float
    tokens_per_minute: int | None = None
    stored_bytes: int | None = None
    slots: int | None = None
    max_models: int = DEFAULT_MAX_MODELS
    keep_days: int | None = None
    is_operator: bool = False


def check_name(name: str) -> None:
    """Raise a ConfigError if no tenant can have this name."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"tenant {name!r}: want letters, digits, '.', '_' and '-', at most 64")


def add_tenant(ledger: Ledger, name: str, **quotas: Any) -> str:
    """Add a tenant and return its key, which nothing can tell again.

    Parameters
    ----------
    quotas
        Further fields of `Tenant`.

    Raises
    ------
    ConfigError
        The name is taken, or is none.
    """
    check_name(name)
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    row = vars(Tenant(name, time.time(), **quotas)) | {"key_hash": _hash(key)}
    if not ledger.insert(tenants, row):
        raise ConfigError(f"tenant {name!r}: there is one already; revoke its key first")
    return key


def revoke(ledger: Ledger, name: str) -> None:
    """Let a tenant's key open nothing any more; what it has trained stays.

    Raises
    ------
    ConfigError
        There is no such tenant.
    """
    if not ledger.execute(tenants.delete().where(tenants.c.name == name)):
        raise ConfigError(f"tenant {name!r}: there is none of that name")


def all_tenants(ledger: Ledger) -> list[Tenant]:
    """Return the tenants, by name."""
    return [_tenant(row) for row in ledger.rows(sa.select(tenants).order_by(tenants.c.name))]


def tenant_of(ledger: Ledger, key: str) -> Tenant | None:
    """Return the tenant with this key."""
    return _found(ledger, tenants.c.key_hash == _hash(key))


def tenant_named(ledger: Ledger, name: str) -> Tenant | None:
    """Return the tenant of a name, None if it has no key any more."""
    return _found(ledger, tenants.c.name == name)


def _found(ledger: Ledger, condition: sa.ColumnElement[bool]) -> Tenant | None:
    rows = ledger.rows(sa.select(tenants).where(condition))
    return _tenant(rows[0]) if rows else None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def _tenant(row: dict[str, Any]) -> Tenant:
    return Tenant(**{name: value for name, value in row.items() if name != "key_hash"})
