"""What the service must not forget: tenants, sessions, models, requests, checkpoints, in SQLite.

What is written here is on disk when a method returns. A model's state is not here: it follows from
its last snapshot and the requests after it (`service.coordinator`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Float, Integer, LargeBinary, String, Text

from lobra.common.errors import ConfigError

FILE = "ledger.sqlite"
FORMAT = 1
SAMPLE = "sample"  # the kind of requests that are of a sampling session, not of a model
RESULT_LIFE_S = 3600.0  # how long a result may be asked for again

_metadata = sa.MetaData()


def _table(name: str, *columns: sa.Column[Any] | sa.UniqueConstraint) -> sa.Table:
    return sa.Table(name, _metadata, *columns)


tenants = _table(
    "tenants",
    sa.Column("name", String, primary_key=True),
    sa.Column("key_hash", String, unique=True, nullable=False),
    sa.Column("created_at", Float, nullable=False),
    sa.Column("tokens_per_minute", BigInteger),
    sa.Column("max_models", Integer),
    sa.Column("is_operator", Boolean, nullable=False),
)
sessions = _table(
    "sessions",
    sa.Column("id", String, primary_key=True),
    sa.Column("tenant", String, nullable=False),
    sa.Column("created_at", Float, nullable=False),
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
    sa.Column("snapshot", String, nullable=False),
    sa.Column("snapshot_seq", Integer, nullable=False),
    sa.Column("snapshot_updates", Integer, nullable=False),
)
requests = _table(
    "requests",
    sa.Column("id", String, primary_key=True),
    sa.Column("tenant", String, nullable=False),
    sa.Column("model_id", String, nullable=False),
    sa.Column("seq_id", Integer, nullable=False),
    sa.Column("kind", String, nullable=False),
    sa.Column("body", LargeBinary),
    sa.Column("arrived_at", Float, nullable=False),
    sa.Column("finished_at", Float),
    sa.Column("result", LargeBinary),
    sa.Column("error", Text),
    sa.UniqueConstraint("model_id", "seq_id"),
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
    sa.Column("updates", Integer, nullable=False),
    sa.Column("size_bytes", BigInteger, nullable=False),
    sa.Column("user_metadata", Text, nullable=False),
    sa.Column("created_at", Float, nullable=False),
    sa.Column("expires_at", Float),
)


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
    snapshot, snapshot_seq, snapshot_updates
        The folder of its last snapshot ("": it starts fresh), the request it was made after, and
        the updates until then.
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
    snapshot: str = ""
    snapshot_seq: int = 0
    snapshot_updates: int = 0


@dataclass(frozen=True)
class RequestRow:
    """A request that was accepted; finished, it has a result or an error."""

    id: str
    tenant: str
    model_id: str
    seq_id: int
    kind: str
    body: bytes | None
    arrived_at: float
    finished_at: float | None = None
    result: bytes | None = None
    error: str | None = None


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint by its path, `tinker://<model>/<kind>/<name>`."""

    path: str
    tenant: str
    model_id: str
    kind: str
    name: str
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


class Ledger:
    """The service's database; its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Open the database of a state folder, made if there is none.

        Raises
        ------
        ConfigError
            Another version wrote it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self.engine = sa.create_engine(f"sqlite:///{self.path}", connect_args={"timeout": 60})
        sa.event.listen(self.engine, "connect", _durable)
        with self.engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in (0, FORMAT):
                raise ConfigError(
                    f"{self.path}: is of format {found}, this version reads {FORMAT}; use the "
                    f"version that wrote it or another --state-dir"
                )
            connection.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
            _metadata.create_all(connection)

    def insert(self, table: sa.Table, values: Mapping[str, Any]) -> bool:
        """Add a row; return whether it is new."""
        try:
            with self.engine.begin() as connection:
                connection.execute(table.insert().values(**_as_columns(values)))
        except sa.exc.IntegrityError:
            return False
        return True

    def rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """Return what a query finds."""
        with self.engine.connect() as connection:
            return [_as_values(row) for row in connection.execute(query).mappings()]

    def execute(self, *statements: sa.UpdateBase) -> int:
        """Carry statements out, all or none; return how many rows the first one changed."""
        with self.engine.begin() as connection:
            counts = [connection.execute(statement).rowcount for statement in statements]
        return counts[0]

    # -- models and their requests --------------------------------------------------------------

    def model(self, model_id: str) -> ModelRow | None:
        """Return a model, None if there is none of that name."""
        found = self.rows(sa.select(models).where(models.c.id == model_id))
        return ModelRow(**found[0]) if found else None

    def models_of(self, tenant: str | None) -> list[ModelRow]:
        """Return a tenant's open models, the latest first; None: everybody's."""
        query = sa.select(models).where(models.c.is_open).order_by(models.c.created_at.desc())
        return [ModelRow(**row) for row in self.rows(_only(query, models, tenant))]

    def waiting(self, tenant: str | None) -> dict[str, int]:
        """Return how many requests of a tenant have no result yet; None: of everybody."""
        query = sa.select(requests.c.tenant, sa.func.count().label("count")).where(
            requests.c.finished_at.is_(None)
        )
        rows = self.rows(_only(query, requests, tenant).group_by(requests.c.tenant))
        return {row["tenant"]: row["count"] for row in rows}

    def close_model(self, model_id: str) -> None:
        """Note that a model is trained no more."""
        self.execute(models.update().where(models.c.id == model_id).values(is_open=False))

    def request(self, request_id: str) -> RequestRow | None:
        """Return a request without its body, None if there is none of that name."""
        query = sa.select(*[c for c in requests.c if c.name != "body"], sa.null().label("body"))
        found = self.rows(query.where(requests.c.id == request_id))
        return RequestRow(**found[0]) if found else None

    def last_seq(self, model_id: str) -> int:
        """Return the number of a model's last request."""
        query = sa.select(sa.func.max(requests.c.seq_id), models.c.snapshot_seq)
        join = requests.c.model_id == models.c.id
        with self.engine.connect() as connection:
            found = connection.execute(query.where(join, models.c.id == model_id)).one()
        return max(number for number in found if number is not None)

    def last_arrival(self, model_id: str) -> float | None:
        """Return when a model was last asked for, None if that is not remembered."""
        query = sa.select(sa.func.max(requests.c.arrived_at).label("at"))
        found: float | None = self.rows(query.where(requests.c.model_id == model_id))[0]["at"]
        return found

    def tenant_of_session(self, session_id: str) -> str | None:
        """Return whose a session is, None if there is none of that name."""
        found = self.rows(sa.select(sessions.c.tenant).where(sessions.c.id == session_id))
        return found[0]["tenant"] if found else None

    def request_id(self, model_id: str, seq_id: int) -> str | None:
        """Return the name of a model's request, None if there is none of that number."""
        query = sa.select(requests.c.id).where(
            requests.c.model_id == model_id, requests.c.seq_id == seq_id
        )
        found = self.rows(query)
        return found[0]["id"] if found else None

    def requests_after(self, model_id: str, seq_id: int) -> list[RequestRow]:
        """Return a model's requests after one, finished ones too, in order."""
        query = sa.select(requests).where(
            requests.c.model_id == model_id, requests.c.seq_id > seq_id
        )
        return [RequestRow(**row) for row in self.rows(query.order_by(requests.c.seq_id))]

    def unfinished_models(self) -> list[str]:
        """Return the names of the models that have requests to be carried out."""
        query = sa.select(requests.c.model_id).where(
            requests.c.finished_at.is_(None), requests.c.kind != SAMPLE
        )
        return [row["model_id"] for row in self.rows(query.distinct())]

    def unfinished_samples(self) -> list[RequestRow]:
        """Return the requests for samples that are to be carried out, the oldest first."""
        query = sa.select(requests).where(
            requests.c.finished_at.is_(None), requests.c.kind == SAMPLE
        )
        return [RequestRow(**row) for row in self.rows(query.order_by(requests.c.arrived_at))]

    def forget_samples(self) -> None:
        """Forget the samples that nobody may ask for any more."""
        self.execute(
            requests.delete().where(
                requests.c.kind == SAMPLE, requests.c.finished_at < time.time() - RESULT_LIFE_S
            )
        )

    def sampler(self, sampler_id: str) -> SamplerRow | None:
        """Return a sampling session, None if there is none of that name."""
        found = self.rows(sa.select(samplers).where(samplers.c.id == sampler_id))
        return SamplerRow(**found[0]) if found else None

    def finish(
        self,
        request_id: str,
        result: bytes | None,
        error: str | None = None,
        also: Iterable[sa.UpdateBase] = (),
    ) -> None:
        """Note a request's result, or why it has none, and what else became of it, as one."""
        values = {"result": result, "error": error, "finished_at": time.time()}
        finished = requests.update().where(requests.c.id == request_id).values(**values)
        self.execute(finished, *also)

    # -- checkpoints ----------------------------------------------------------------------------

    def checkpoint(self, path: str) -> CheckpointRow | None:
        """Return a checkpoint, None if there is none of that path."""
        found = self.rows(sa.select(checkpoints).where(checkpoints.c.path == path))
        return CheckpointRow(**found[0]) if found else None

    def checkpoints_of(self, model_id: str) -> list[CheckpointRow]:
        """Return a model's checkpoints, the oldest first."""
        query = sa.select(checkpoints).where(checkpoints.c.model_id == model_id)
        return [CheckpointRow(**row) for row in self.rows(query.order_by(checkpoints.c.created_at))]

    def last_checkpoints(self, tenant: str | None, most: int) -> list[CheckpointRow]:
        """Return a tenant's last checkpoints, the latest first; None: everybody's."""
        query = sa.select(checkpoints).order_by(checkpoints.c.created_at.desc()).limit(most)
        return [CheckpointRow(**row) for row in self.rows(_only(query, checkpoints, tenant))]

    def expired(self, now: float) -> list[CheckpointRow]:
        """Return the checkpoints whose time is over."""
        query = sa.select(checkpoints).where(checkpoints.c.expires_at < now)
        return [CheckpointRow(**row) for row in self.rows(query)]

    def drop_checkpoint(self, path: str) -> None:
        """Forget a checkpoint."""
        self.execute(checkpoints.delete().where(checkpoints.c.path == path))


# What else may become of a request (`Ledger.finish`).


def with_row(table: sa.Table, row: Any) -> sa.UpdateBase:
    """Return what adds a row, a dataclass, in the place of one with its key."""
    return table.insert().prefix_with("OR REPLACE").values(**_as_columns(vars(row)))


def with_snapshot(
    model_id: str, folder: Path, seq_id: int, updates: int
) -> tuple[sa.UpdateBase, ...]:
    """Return what notes a model's snapshot; what led to it needs not be remembered."""
    own = (requests.c.model_id == model_id, requests.c.seq_id <= seq_id)
    return (
        models.update()
        .where(models.c.id == model_id)
        .values(snapshot=str(folder), snapshot_seq=seq_id, snapshot_updates=updates),
        requests.update().where(*own).values(body=None),
        requests.delete().where(*own, requests.c.finished_at < time.time() - RESULT_LIFE_S),
    )


def _only(query: sa.Select[Any], table: sa.Table, tenant: str | None) -> sa.Select[Any]:
    return query if tenant is None else query.where(table.c.tenant == tenant)


_JSON_COLUMNS = ("target_modules", "user_metadata")


def _as_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: json.dumps(v) if k in _JSON_COLUMNS else v for k, v in values.items()}


def _as_values(columns: sa.RowMapping) -> dict[str, Any]:
    values = {k: json.loads(v) if k in _JSON_COLUMNS else v for k, v in columns.items()}
    if "target_modules" in values:
        values["target_modules"] = tuple(values["target_modules"])
    return values


def _durable(connection: Any, _record: Any) -> None:
    """Have readers and a writer at once, and every commit on disk."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
