"""`lobra keys`: who may use a service, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lobra.common.errors import ConfigError
from lobra.common.options import PositiveInt, as_options, option_problems

StateDir = Annotated[Path, Parameter(help="The service's state folder.")]


@as_options
@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What a tenant may use.

    Parameters
    ----------
    tokens_per_minute
        Tokens it may send, or have sampled, in a minute; by default any number.
    stored_bytes
        What its checkpoints and requests may take on disk; by default any size.
    slots
        Its models that may be on the ranks at once; by default all.
    max_models
        Models it may have open at once.
    keep_days
        How long its checkpoints are kept that do not say so themselves, and its models that nobody
        asks for; by default for ever.
    operator
        The page at / shows it everybody's models, and /metrics lets it in.
    """

    tokens_per_minute: PositiveInt | None = None
    stored_bytes: PositiveInt | None = None
    slots: PositiveInt | None = None
    max_models: PositiveInt = 8
    keep_days: PositiveInt | None = None
    operator: bool = False


NO_QUOTAS = Quotas()


def add(
    name: str, /, *, quotas: Quotas = NO_QUOTAS, state_dir: StateDir = Path("runs/service")
) -> int:
    """Add a tenant and print its key, which is not kept: nothing can print it again.

    Parameters
    ----------
    name
        Of the tenant.
    """
    from lobra.service.ledger import Ledger
    from lobra.service.state_folder import other_things
    from lobra.service.tenants import add_tenant, check_name

    problems = option_problems(quotas)
    problems += other_things(state_dir)
    with problems.noted():
        check_name(name)
    problems.raise_if_any()
    fields = vars(quotas).copy()
    is_operator = fields.pop("operator")
    print(add_tenant(Ledger(state_dir), name, **fields, is_operator=is_operator))
    return 0


def revoke(name: str, /, *, state_dir: StateDir = Path("runs/service")) -> int:
    """Let a tenant's key open nothing any more; what it has trained stays.

    Parameters
    ----------
    name
        Of the tenant.
    """
    from lobra.service.ledger import Ledger
    from lobra.service.tenants import revoke as revoke_key

    _check(state_dir)
    revoke_key(Ledger(state_dir), name)
    return 0


def delete_data(name: str, /, *, state_dir: StateDir = Path("runs/service")) -> int:
    """Delete all that a tenant has sent and trained; its key stays.

    A service that runs does so within seconds; else it is done at once.

    Parameters
    ----------
    name
        Of the tenant.
    """
    from lobra.service.ledger import Ledger
    from lobra.service.retention import ask_to_delete

    _check(state_dir)
    print(ask_to_delete(Ledger(state_dir), state_dir, name))
    return 0


def show(*, state_dir: StateDir = Path("runs/service")) -> int:
    """List the tenants, what they may use and what they store; their keys are not known."""
    from lobra.service.ledger import Ledger
    from lobra.service.tenants import all_tenants

    _check(state_dir)
    ledger = Ledger(state_dir)
    for tenant in all_tenants(ledger):
        since = datetime.fromtimestamp(tenant.created_at, UTC).date()
        rate = _quota(tenant.tokens_per_minute, "any number of")
        stored = f"{ledger.stored_bytes(tenant.name):,} of {_quota(tenant.stored_bytes, 'any')}"
        slots, kept = _quota(tenant.slots, "all"), _quota(tenant.keep_days, "any number of")
        print(
            f"{tenant.name}  since {since}, {rate} tokens a minute, {stored} bytes stored, "
            f"{tenant.max_models} models, {slots} slots, kept {kept} days"
            f"{', operator' if tenant.is_operator else ''}"
        )
    return 0


def _quota(quota: int | None, without: str) -> str:
    return without if quota is None else f"{quota:,}"


def _check(state_dir: Path) -> None:
    from lobra.service.state_folder import LEDGER_FILE

    if not (state_dir / LEDGER_FILE).is_file():
        raise ConfigError(f"--state-dir {state_dir}: no service has been there")
