"""A rank that a launcher has started: what it says when it fails, and how it ends."""

from __future__ import annotations

import os
import platform
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from lobra.common.errors import ConfigError, MachineError

T = TypeVar("T")


def run_launched(run: Callable[[], T], begun_in: Path | None = None) -> T | None:
    """Return what a rank's part of a command returns; where it fails, its process ends.

    None on other ranks than rank 0 where all were refused: rank 0 raises what says why.

    Parameters
    ----------
    run
        Raises as `trainer.run.run_in_launcher` does.
    begun_in
        The folder of a run of which it is to be said, where it fails, how it goes on.
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
        _leave(str(error), 1, begun_in)
    except Exception:
        _leave(f"failed\n{traceback.format_exc().rstrip()}", 1, begun_in)


def _leave(message: str, code: int, begun_in: Path | None = None) -> NoReturn:
    """Say why this rank fails, and how the run begun in a folder goes on; end the process at once.

    To end in good order would be to wait for ranks that wait for this one.
    """
    print(f"lobra: rank {os.environ['RANK']} on {platform.node()}: {message}", file=sys.stderr)
    if begun_in is not None:
        from lobra.trainer.restarts import how_to_go_on

        print(how_to_go_on(begun_in), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
