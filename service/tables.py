"""The tables of the service's database, and what a row of each is in Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Float, Integer, LargeBinary, String, Text

SAMPLE = "sample"  # the kind of requests that are of a sampling session, not of a model
USER, SERVER = "user", "server"  # whose fault an error is: the tenant's, or the operator's
#: Columns that hold JSON.
JSON_COLUMNS = ("target_modules", "user_metadata")

metadata = sa.MetaData()


def _table(name: str, *columns: sa.Column[Any] | sa.UniqueConstraint | sa.Index) -> sa.Table:
    return sa.Table(name, metadata, *columns)


tenants = _table(
    "tenants",
    sa.Column("name", String, primary_key=True),
    sa.Column("key_hash", String, unique=True, nullable=False),
    sa.Column("created_at", Float, nullable=False),
    sa.Column("tokens_per_minute", BigInteger),
    sa.Column("stored_bytes", BigInteger),
    sa.Column("slots", Integer),
    sa.Column("max_models", Integer),
    sa.Column("keep_days", Integer),
    sa.Column("is_operator", Boolean, nullable=False),
)
#: Tenants of whom everything is to be deleted.
deletions = _table("deletions", sa.Column("tenant", String, primary_key=True))
sessions = _table(
    "sessions",
    sa.Column("id", String, primary_key=True),
    sa.Column("tenant", String, nullable=False),
    sa.Column("created_at", Float, nullable=False),
    sa.Column("seen_at", Float),  # to the hour; None: within an hour of when it was made
)
models = _table(
    "models",
    sa.Column("id", String, primary_key=True),
    sa.Column("tenant", String, nullable=False),
    sa.Column("session_id", String, nullable=False),
    sa.Column("rank", Integer, nullable=False),
    sa.Column("target_modules", Text, nullable=False),
    sa.Column("seed", BigInteger, nullable=False),
    sa.Column("user_metadata", Text, nullable=False),
    sa.Column("created_at", Float, nullable=False),
    sa.Column("is_open", Boolean, nullable=False),
    sa.Column("snapshot_seq", Integer, nullable=False),
    sa.Column("snapshot_updates", Integer, nullable=False),
    sa.Column("snapshot_at", Float, nullable=False),
)
#: The mean loss of every update of a model.
losses = _table(
    "losses",
    sa.Column("model_id", String, primary_key=True),
    sa.Column("updates", Integer, primary_key=True),
    sa.Column("loss", Float, nullable=False),
)
requests = _table(
    "requests",
    sa.Column("id", String, primary_key=True),
    sa.Column("tenant", String, nullable=False, index=True),
    sa.Column("model_id", String, nullable=False),
    sa.Column("seq_id", Integer, nullable=False),
    sa.Column("kind", String, nullable=False),
    sa.Column("body", LargeBinary),
    sa.Column("arrived_at", Float, nullable=False),
    sa.Column("finished_at", Float),
    sa.Column("tries", Integer, nullable=False),
    sa.Column("result", LargeBinary),
    sa.Column("error", Text),
    sa.Column("category", String),
    sa.UniqueConstraint("model_id", "seq_id"),
    sa.Index("requests_by_end", "finished_at", "tenant"),  # who waits, and what has had its time
)
samplers = _table(
    "samplers",
    sa.Column("id", String, primary_key=True),
    sa.Column("tenant", String, nullable=False),
    sa.Column("path", String, nullable=False),
)
checkpoints = _table(
    "checkpoints",
    sa.Column("path", String, primary_key=True),
    sa.Column("tenant", String, nullable=False),
    sa.Column("model_id", String, nullable=False),
    sa.Column("kind", String, nullable=False),
    sa.Column("name", String, nullable=False),
    sa.Column("seq_id", Integer, nullable=False),
    sa.Column("updates", Integer, nullable=False),
    sa.Column("size_bytes", BigInteger, nullable=False),
    sa.Column("user_metadata", Text, nullable=False),
    sa.Column("created_at", Float, nullable=False),
    sa.Column("expires_at", Float),
)
#: Those whose rows are a tenant's, each by a column of that name.
OF_TENANTS = (requests, checkpoints, samplers, models, sessions, deletions)


@dataclass(frozen=True)
class ModelRow:
    """A model: an adapter that a tenant trains.

    Attributes
    ----------
    id, tenant, session_id
        Its name, its owner, and the session that made it.
    rank, target_modules, seed
        What its adapter is.
    user_metadata
        What its owner notes of it.
    created_at
        Seconds since the epoch.
    is_open
        Whether it may still be trained.
    snapshot_seq, snapshot_updates, snapshot_at
        The request after which its last snapshot was made (-1: it has none, and starts fresh), the
        updates until then, and when that was.
    """

    id: str
    tenant: str
    session_id: str
    rank: int
    target_modules: tuple[str, ...]
    seed: int
    user_metadata: dict[str, Any]
    created_at: float
    is_open: bool = True
    snapshot_seq: int = -1
    snapshot_updates: int = 0
    snapshot_at: float = 0.0

    @property
    def adapter(self) -> tuple[int, tuple[str, ...]]:
        """Its rank and its modules, of which the memory it takes follows."""
        return self.rank, self.target_modules


@dataclass(frozen=True)
class RequestRow:
    """A request that was accepted; finished, it has a result or an error.

    `tries` counts how often it was begun to be computed; `category` says whose fault an error is.
    """

    id: str
    tenant: str
    model_id: str
    seq_id: int
    kind: str
    body: bytes | None
    arrived_at: float
    finished_at: float | None = None
    tries: int = 0
    result: bytes | None = None
    error: str | None = None
    category: str | None = None

    @property
    def is_forgotten(self) -> bool:
        """Whether its result may not be asked for any more."""
        return self.finished_at is not None and self.result is None and self.error is None


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint by its path, `tinker://<model>/<kind>/<name>`, and the request that made it."""

    path: str
    tenant: str
    model_id: str
    kind: str
    name: str
    seq_id: int
    updates: int
    size_bytes: int
    user_metadata: dict[str, Any]
    created_at: float
    expires_at: float | None = None


@dataclass(frozen=True)
class SamplerRow:
    """A sampling session: a checkpoint that is sampled from, or (no path) the base model."""

    id: str
    tenant: str
    path: str
