"""`lobra keys`: who may use a service."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lobra.common.errors import ConfigError, Problems
from lobra.common.options import PositiveInt

StateDir = Annotated[Path, Parameter(help="The service's state folder.")]


def add(
    name: str,
    /,
    *,
    state_dir: StateDir = Path("runs/service"),
    tokens_per_minute: PositiveInt | None = None,
    max_models: PositiveInt = 8,
    operator: bool = False,
) -> int:
    """Add a tenant and print its key, which is not kept: nothing can print it again.

    Parameters
    ----------
    name
        Of the tenant.
    tokens_per_minute
        Tokens it may send in a minute; by default any number.
    max_models
        Models it may have open at once.
    operator
        The page at / shows it everybody's models, and /metrics lets it in.
    """
    from lobra.service.ledger import Ledger
    from lobra.service.tenants import add_tenant

    problems = Problems(
        f"--{option} {value}: want a whole number of 1 or more"
        for option, value in (("tokens-per-minute", tokens_per_minute), ("max-models", max_models))
        if value is not None and value < 1
    )
    problems.raise_if_any()
    print(add_tenant(Ledger(state_dir), name, tokens_per_minute, max_models, operator))
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


def show(*, state_dir: StateDir = Path("runs/service")) -> int:
    """List the tenants; their keys are not known."""
    from lobra.service.ledger import Ledger
    from lobra.service.tenants import all_tenants

    _check(state_dir)
    for tenant in all_tenants(Ledger(state_dir)):
        since = datetime.fromtimestamp(tenant.created_at, UTC).date()
        rate = tenant.tokens_per_minute or "any number of"
        print(f"{tenant.name}  since {since}, {rate} tokens a minute, {tenant.max_models} models")
    return 0


def _check(state_dir: Path) -> None:
    from lobra.service.ledger import FILE

    if not (state_dir / FILE).is_file():
        raise ConfigError(f"--state-dir {state_dir}: no service has been there")
