"""A rank that a launcher has started: what it says when it fails, and how it ends."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from lobra.common.errors import ConfigError, MachineError

T = TypeVar("T")


def run_launched(run: Callable[[], T], remedy: Callable[[], str] | None) -> T | None:
    """Return what a rank's part of a command returns; where it fails, its process ends.

    None on other ranks than rank 0 where all were refused: rank 0 raises what says why.

    Parameters
    ----------
    run
        Raises as `trainer.run.run_in_launcher` does.
    remedy
        Returns how one goes on where it fails, which rank 0 says; None: who started the launcher
        does.
    """
    from lobra.trainer.run import Refusal

    try:
        return run()
    except Refusal:
        if os.environ["RANK"] == "0":
            raise
        return None
    except ConfigError as error:
        _leave(str(error), 2)
    except MachineError as error:
        _leave(str(error), 1, remedy)
    except Exception:
        _leave(f"failed\n{traceback.format_exc().rstrip()}", 1, remedy)


def _leave(message: str, code: int, remedy: Callable[[], str] | None = None) -> NoReturn:
    """Say why this rank fails and, on rank 0, how one goes on; end the process at once.

    To end in good order would be to wait for ranks that wait for this one.
    """
    print(f"lobra: rank {os.environ['RANK']} on {platform.node()}: {message}", file=sys.stderr)
    if remedy is not None and os.environ["RANK"] == "0":
        print(remedy(), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
