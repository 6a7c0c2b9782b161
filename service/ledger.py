"""What the service must not forget: tenants, sessions, models, requests, checkpoints, in SQLite.

What is written here is on disk when a method returns. A model's state is not here: it follows from
its last snapshot and the requests after it (`service.coordinator`).
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from lobra.common.errors import ConfigError
from lobra.common.storage import StorageError
from lobra.service.state_folder import LEDGER_FILE, MODELS
from lobra.service.tables import (
    JSON_COLUMNS,
    OF_TENANTS,
    SAMPLE,
    USER,
    CheckpointRow,
    ModelRow,
    RequestRow,
    SamplerRow,
    checkpoints,
    losses,
    metadata,
    models,
    requests,
    samplers,
    sessions,
)

log = logging.getLogger(__name__)

FORMAT = 2
RESULT_LIFE_S = 3600.0  # how long a result may be asked for again
RETRY_S = 5.0  # between two tries to write, of who can only wait


class Ledger:
    """The service's database; its methods may be called from any thread.

    Once it is open they raise a StorageError where its disk is full, read-only or broken.
    """

    def __init__(self, folder: Path) -> None:
        """Open the database of a state folder, made if there is none.

        Raises
        ------
        ConfigError
            Another version wrote it, or it cannot be used.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"cannot be used ({error.strerror}); give another"
            raise ConfigError(f"--state-dir {folder}: {text}") from error
        self.path = folder / LEDGER_FILE
        self.engine = sa.create_engine(f"sqlite:///{self.path}", connect_args={"timeout": 60})
        sa.event.listen(self.engine, "connect", _durable)
        try:
            self._open()
        except sa.exc.DatabaseError as error:
            raise ConfigError(
                f"{self.path}: SQLite cannot use it ({error.orig}); make room for it, or, if it is "
                f"damaged, restore a backup (lobra backup makes them)"
            ) from error
        sa.event.listen(self.engine, "handle_error", partial(_denied, self.path))
        self._is_over: Callable[[], bool] = lambda: True

    def patient(self, is_over: Callable[[], bool]) -> Ledger:
        """Return the same database for a thread whose work is lost if it cannot be noted.

        What `execute` and `finish` cannot write is tried again until it can, or all is over.
        """
        found = copy.copy(self)
        found._is_over = is_over
        return found

    def _open(self) -> None:
        with self.engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in (0, FORMAT):
                raise ConfigError(
                    f"{self.path}: is of format {found}, this version reads {FORMAT}: go on with "
                    f"the version that wrote it, or give another --state-dir and add the tenants "
                    f"anew (lobra keys add); the adapters they saved are below "
                    f"{self.path.with_name(MODELS)}, in PEFT's format, and tasks may start from "
                    f"them (resume_from)"
                )
            connection.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
            metadata.create_all(connection)
            for table in metadata.sorted_tables:  # one that was there may lack columns and indexes
                _complete(connection, table)

    def close(self) -> None:
        """Close the file."""
        self.engine.dispose()

    def insert(self, table: sa.Table, values: Mapping[str, Any]) -> bool:
        """Add a row; return whether it is new."""
        try:
            with self.engine.begin() as connection:
                connection.execute(table.insert().values(**_as_columns(values)))
        except sa.exc.IntegrityError:
            return False
        return True

    def listed(
        self, table: sa.Table, tenant: str, limit: int, offset: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Return some of a tenant's rows, the latest first, and how many there are in all."""
        own = sa.select(table).where(table.c.tenant == tenant)
        rows = own.order_by(table.c.created_at.desc()).limit(limit).offset(offset)
        return self.rows(rows), self.number(sa.select(sa.func.count()).select_from(own.subquery()))

    def rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """Return what a query finds."""
        with self.engine.connect() as connection:
            return [_as_values(row) for row in connection.execute(query).mappings()]

    def number(self, query: sa.Select[Any]) -> Any:
        """Return the one value that a query finds, None where there is none."""
        with self.engine.connect() as connection:
            return connection.execute(query).scalar()

    def execute(self, *statements: sa.UpdateBase | sa.TextClause) -> int:
        """Carry statements out, all or none; return how many rows the first one changed."""
        is_told = False
        while True:
            try:
                with self.engine.begin() as connection:
                    counts = [connection.execute(one).rowcount for one in statements]
                return counts[0]
            except StorageError as error:
                if self._is_over():
                    raise
                if not is_told:
                    log.error("%s; what is done waits to be noted until it can", error)
                is_told = True
                time.sleep(RETRY_S)

    # -- models and their requests --------------------------------------------------------------

    def model(self, model_id: str) -> ModelRow | None:
        """Return a model, None if there is none of that name."""
        found = self.rows(sa.select(models).where(models.c.id == model_id))
        return ModelRow(**found[0]) if found else None

    def models_of(self, tenant: str | None) -> list[ModelRow]:
        """Return a tenant's open models, the latest first; None: everybody's."""
        query = sa.select(models).where(models.c.is_open).order_by(models.c.created_at.desc())
        return [ModelRow(**row) for row in self.rows(_only(query, models, tenant))]

    def losses_of(self, model_id: str, most: int) -> list[float]:
        """Return the mean losses of a model's updates, as many evenly spread ones at most."""
        own = losses.c.model_id == model_id
        count = self.number(sa.select(sa.func.max(losses.c.updates)).where(own)) or 0
        every = -(-count // most) or 1
        query = sa.select(losses.c.loss).where(own, losses.c.updates % every == count % every)
        return [row["loss"] for row in self.rows(query.order_by(losses.c.updates))]

    def waiting(self, tenant: str | None) -> dict[str, int]:
        """Return how many requests of each model of a tenant have no result; None: everybody's."""
        query = sa.select(requests.c.model_id, sa.func.count().label("count")).where(
            requests.c.finished_at.is_(None)
        )
        rows = self.rows(_only(query, requests, tenant).group_by(requests.c.model_id))
        return {row["model_id"]: row["count"] for row in rows}

    def waiting_of_tenants(self) -> dict[str, int]:
        """Return how many requests of each tenant have no result."""
        query = sa.select(requests.c.tenant, sa.func.count().label("count")).where(
            requests.c.finished_at.is_(None)
        )
        return {row["tenant"]: row["count"] for row in self.rows(query.group_by(requests.c.tenant))}

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

    def first_missing(self, model_id: str) -> int:
        """Return the lowest number, after its snapshot, that no request of a model has."""
        query = sa.select(requests.c.seq_id).where(requests.c.model_id == model_id)
        known = {row["seq_id"] for row in self.rows(query)}
        model = self.model(model_id)
        assert model is not None
        number = model.snapshot_seq + 1
        while number in known:
            number += 1
        return number

    def last_use(self, model: ModelRow) -> float:
        """Return when a model was last asked for, or written down after that."""
        arrival = self.number(
            sa.select(sa.func.max(requests.c.arrived_at)).where(requests.c.model_id == model.id)
        )
        return max(model.created_at, model.snapshot_at, arrival or 0.0)

    def tenant_of_session(self, session_id: str) -> str | None:
        """Return whose a session is, None if there is none of that name."""
        found: str | None = self.number(
            sa.select(sessions.c.tenant).where(sessions.c.id == session_id)
        )
        return found

    def note_sign(self, session_id: str) -> None:
        """Note that a session goes on."""
        own = sessions.update().where(sessions.c.id == session_id)
        self.execute(own.values(seen_at=time.time()))

    def of_session(self, session_id: str) -> tuple[list[str], list[str]]:
        """Return the names of a session's models and of its sampling sessions."""
        own = samplers.c.id.startswith(f"{session_id}:", autoescape=True)
        found = (
            self.rows(sa.select(models.c.id).where(models.c.session_id == session_id)),
            self.rows(sa.select(samplers.c.id).where(own)),
        )
        made, sampling = ([row["id"] for row in rows] for rows in found)
        return made, sampling

    def request_id(self, model_id: str, seq_id: int) -> str | None:
        """Return the name of a model's request, None if there is none of that number."""
        found: str | None = self.number(
            sa.select(requests.c.id).where(
                requests.c.model_id == model_id, requests.c.seq_id == seq_id
            )
        )
        return found

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

    def forget_results(self, now: float) -> None:
        """Forget the results that nobody may ask for any more, and samples altogether."""
        old = requests.c.finished_at < now - RESULT_LIFE_S
        self.execute(
            requests.delete().where(requests.c.kind == SAMPLE, old),
            requests.update().where(old, requests.c.result.is_not(None)).values(result=None),
        )

    def sampler(self, sampler_id: str) -> SamplerRow | None:
        """Return a sampling session, None if there is none of that name."""
        found = self.rows(sa.select(samplers).where(samplers.c.id == sampler_id))
        return SamplerRow(**found[0]) if found else None

    def note_try(self, request_ids: Iterable[str]) -> None:
        """Note that requests are begun to be computed."""
        own = requests.update().where(requests.c.id.in_(list(request_ids)))
        self.execute(own.values(tries=requests.c.tries + 1))

    def forget_tries(self, model_id: str) -> None:
        """Note that what was begun of a model was not ended by a fault of its own."""
        unfinished = requests.c.finished_at.is_(None)
        own = requests.update().where(requests.c.model_id == model_id, unfinished)
        self.execute(own.values(tries=0))

    def finish(
        self,
        request_id: str,
        result: bytes | None,
        error: str | None = None,
        also: Iterable[sa.UpdateBase] = (),
        category: str = USER,
    ) -> None:
        """Note a request's result, or why it has none, and what else became of it, as one."""
        noted = {"error": error, "category": None if error is None else category}
        values = {"result": result, "finished_at": time.time(), **noted}
        finished = requests.update().where(requests.c.id == request_id).values(**values)
        self.execute(finished, *also)

    # -- what is kept ---------------------------------------------------------------------------

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

    def forget_expired(self, now: float) -> None:
        """Forget the checkpoints whose time is over."""
        self.execute(checkpoints.delete().where(checkpoints.c.expires_at < now))

    def forget_sessions(self, silent_since: float) -> None:
        """Forget sessions without a sign of life since then, and what none samples from any more.

        Sessions with open models stay, and sampling sessions of which results may be asked for.
        """
        last_sign = sa.func.coalesce(sessions.c.seen_at, sessions.c.created_at)
        is_open = sa.exists().where(models.c.is_open, models.c.session_id == sessions.c.id)
        session_id = sa.func.substr(samplers.c.id, 1, sa.func.instr(samplers.c.id, ":") - 1)
        is_over = ~sa.exists().where(sessions.c.id == session_id)
        is_empty = (samplers.c.path != "") & ~sa.exists().where(
            checkpoints.c.path == samplers.c.path
        )
        is_asked = sa.exists().where(requests.c.model_id == samplers.c.id)
        self.execute(
            sessions.delete().where(last_sign < silent_since, ~is_open),
            samplers.delete().where(is_over | is_empty, ~is_asked),
        )

    def set_expiry(self, path: str, expires_at: float | None) -> None:
        """Note when a checkpoint's time is over (seconds since the epoch); None: never."""
        own = checkpoints.update().where(checkpoints.c.path == path)
        self.execute(own.values(expires_at=expires_at))

    def forget_checkpoint(self, path: str) -> None:
        """Forget a checkpoint; its folder is removed when nobody reads it."""
        self.execute(checkpoints.delete().where(checkpoints.c.path == path))

    def stored_bytes(self, tenant: str) -> int:
        """Return what a tenant's checkpoints, and the bodies and results of its requests, take."""
        body, result = (sa.func.length(column) for column in (requests.c.body, requests.c.result))
        content = sa.func.coalesce(body, 0) + sa.func.coalesce(result, 0)
        return sum(
            self.number(sa.select(sa.func.sum(size)).where(table.c.tenant == tenant)) or 0
            for table, size in ((checkpoints, checkpoints.c.size_bytes), (requests, content))
        )

    def waiting_size(self, tenant: str) -> tuple[int, int]:
        """Return how many requests of a tenant have no result, and the bytes of their bodies."""
        size = sa.func.coalesce(sa.func.sum(sa.func.length(requests.c.body)), 0)
        query = sa.select(sa.func.count().label("count"), size.label("bytes"))
        own = (requests.c.tenant == tenant, requests.c.finished_at.is_(None))
        (row,) = self.rows(query.where(*own))
        return row["count"], row["bytes"]

    def first_waiting(self, model_id: str) -> int | None:
        """Return the number of a model's first request without a result, None if all have one."""
        own = (requests.c.model_id == model_id, requests.c.finished_at.is_(None))
        found: int | None = self.number(sa.select(sa.func.min(requests.c.seq_id)).where(*own))
        return found

    def delete_rows_of(self, tenant: str) -> None:
        """Forget all of a tenant but its key; nothing of it is left in the file either."""
        own_models = sa.select(models.c.id).where(models.c.tenant == tenant)
        statements = [
            losses.delete().where(losses.c.model_id.in_(own_models)),
            *(table.delete().where(table.c.tenant == tenant) for table in OF_TENANTS),
        ]
        self.execute(sa.text("PRAGMA secure_delete = ON"), *statements)
        self.execute(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))


# What else may become of a request (`Ledger.finish`).


def with_row(table: sa.Table, row: Any) -> sa.UpdateBase:
    """Return what adds a row, a dataclass, in the place of one with its key."""
    return table.insert().prefix_with("OR REPLACE").values(**_as_columns(vars(row)))


def with_loss(model_id: str, updates: int, loss: float) -> sa.UpdateBase:
    """Return what notes the mean loss of a model's last update of so many."""
    values = {"model_id": model_id, "updates": updates, "loss": loss}
    return losses.insert().prefix_with("OR REPLACE").values(**values)


def without_body(request_id: str) -> sa.UpdateBase:
    """Return what forgets what was asked for, where carrying it out again would change nothing."""
    return requests.update().where(requests.c.id == request_id).values(body=None)


def with_snapshot(model_id: str, seq_id: int, updates: int) -> tuple[sa.UpdateBase, ...]:
    """Return what notes a model's snapshot; what led to it needs not be remembered."""
    own = (requests.c.model_id == model_id, requests.c.seq_id <= seq_id)
    return (
        models.update()
        .where(models.c.id == model_id)
        .values(snapshot_seq=seq_id, snapshot_updates=updates, snapshot_at=time.time()),
        requests.update().where(*own).values(body=None),
        requests.delete().where(*own, requests.c.finished_at < time.time() - RESULT_LIFE_S),
    )


def _only(query: sa.Select[Any], table: sa.Table, tenant: str | None) -> sa.Select[Any]:
    return query if tenant is None else query.where(table.c.tenant == tenant)


def _complete(connection: sa.Connection, table: sa.Table) -> None:
    """Add what a table does not have that an older version made."""
    known = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in known:
            kind = column.type.compile(connection.dialect)
            connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")
    for index in table.indexes:
        index.create(connection, checkfirst=True)


def _as_columns(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: json.dumps(v) if k in JSON_COLUMNS else v for k, v in values.items()}


def _as_values(columns: sa.RowMapping) -> dict[str, Any]:
    values = {k: json.loads(v) if k in JSON_COLUMNS else v for k, v in columns.items()}
    if "target_modules" in values:
        values["target_modules"] = tuple(values["target_modules"])
    return values


def _denied(path: Path, context: sa.engine.ExceptionContext) -> None:
    """Have what SQLite cannot do for the disk's sake said in a line."""
    if isinstance(context.sqlalchemy_exception, sa.exc.OperationalError):
        raise StorageError(
            f"{path}: SQLite cannot use it ({context.original_exception}); make room for it, or "
            f"repair its disk"
        )


def _durable(connection: Any, _record: Any) -> None:
    """Have readers and a writer at once, and every commit on disk."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
