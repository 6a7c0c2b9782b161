"""Ranks that leave their process numbers behind, and of which one dies at a length, once."""

from __future__ import annotations

import os
import signal
from typing import Any

from lobra.layout.order import StepOrder
from lobra.service.engine_link import serve_rank
from lobra.trainer.engine import Engine
from lobra.trainer.run_spec import RunSpec

DEADLY = 13  # tokens of a sequence
MORTAL = 1  # the rank


def serve_mortal(run: RunSpec, **arguments: Any) -> None:
    """Serve as this rank."""
    plain, mark = Engine.carry_out, run.output_dir / "died"
    (run.output_dir / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))

    def carry_out(self: Engine, order: StepOrder, *more: Any) -> Any:
        is_deadly = any(len(sequence.tokens) == DEADLY for sequence in order.sequences)
        if is_deadly and self.rank == MORTAL and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, order, *more)

    Engine.carry_out = carry_out  # type: ignore[method-assign]
    serve_rank(run, **arguments)
