"""What is deleted: what has had its time, what a tenant wants gone, what nothing names any more."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from lobra.common.errors import ConfigError
from lobra.common.files import remove_folder
from lobra.service.ledger import Ledger
from lobra.service.state_folder import MODELS, StateFolder
from lobra.service.tables import (
    OF_TENANTS,
    CheckpointRow,
    checkpoints,
    deletions,
    models,
    tenants,
)
from lobra.service.tenants import all_tenants

DAY_S = 86400.0
SESSION_DAYS = 7  # that a session without a sign of life, and without open models, is kept


def abandoned_models(ledger: Ledger, now: float) -> list[str]:
    """Return the open models that nobody has asked for as long as their tenants keep things."""
    return [
        model.id
        for tenant in all_tenants(ledger)
        if tenant.keep_days is not None
        for model in ledger.models_of(tenant.name)
        if ledger.last_use(model) < now - tenant.keep_days * DAY_S
    ]


def delete_data(kept: StateFolder, ledger: Ledger, tenant: str) -> None:
    """Delete all that a tenant has sent and trained, but not its key.

    None of its models may have a slot.
    """
    query = sa.select(models.c.id).where(models.c.tenant == tenant)
    names = [row["id"] for row in ledger.rows(query)]
    ledger.delete_rows_of(tenant)
    for model_id in names:
        if (folder := kept.model(model_id)).is_dir():
            remove_folder(folder)


def named_folders(kept: StateFolder, ledger: Ledger) -> set[Path]:
    """Return the folders that a ledger names: of checkpoints, and of open models' snapshots."""
    named = {kept.checkpoint(CheckpointRow(**row)) for row in ledger.rows(sa.select(checkpoints))}
    query = sa.select(models.c.id, models.c.snapshot_seq)
    rows = ledger.rows(query.where(models.c.is_open, models.c.snapshot_seq >= 0))
    return named | {kept.snapshot(row["id"], row["snapshot_seq"]) for row in rows}


def remove_unnamed(kept: StateFolder, ledger: Ledger) -> None:
    """Remove all other folders: replaced, deleted, closed, or left when a service ended.

    On the coordinator's thread, which reads and writes them.
    """
    named = named_folders(kept, ledger)
    for folder in kept.path.glob(f"{MODELS}/*/*/*"):
        if folder not in named:
            remove_folder(folder)


def to_be_deleted(ledger: Ledger) -> list[str]:
    """Return the tenants of whom everything is to be deleted."""
    return [row["tenant"] for row in ledger.rows(sa.select(deletions))]


def ask_to_delete(ledger: Ledger, folder: Path, tenant: str) -> str:
    """Have all of a tenant deleted, by the service that uses the folder or here; say which.

    Raises
    ------
    ConfigError
        Nothing is known of such a tenant.
    """
    known = [tenants.c.name == tenant, *(table.c.tenant == tenant for table in OF_TENANTS)]
    if not any(ledger.number(sa.select(sa.literal(1)).where(one)) for one in known):
        raise ConfigError(f"tenant {tenant!r}: there is none of that name, and nothing of it")
    ledger.insert(deletions, {"tenant": tenant})
    kept = StateFolder(folder)
    try:
        kept.lock("it deletes it")
    except ConfigError:
        return f"the service deletes all of {tenant} within seconds"
    delete_data(kept, ledger, tenant)
    return f"all of {tenant} is deleted"
