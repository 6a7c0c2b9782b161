"""`lobra backup`: a copy of a service's state folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def backup(
    target: Path,
    /,
    *,
    state_dir: Annotated[Path, Parameter(help="The service's state folder.")] = Path(
        "runs/service"
    ),
) -> int:
    """Copy all that a service must not forget to a new folder, also while it runs.

    To go on from a copy, give it to lobra serve as --state-dir.

    Parameters
    ----------
    target
        The folder that is made.
    """
    from lobra.service.backup import back_up

    print(f"{back_up(state_dir, target):,} bytes in {target}")
    return 0
