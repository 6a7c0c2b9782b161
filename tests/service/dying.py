"""Ranks that leave their process numbers behind; one dies at a length, sleeps at another, once."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from lobra.layout.order import StepOrder
from lobra.service import engine_link
from lobra.trainer.engine import Engine
from lobra.trainer.run_spec import RunSpec

DEADLY, DULL = 13, 17  # tokens of a sequence
MARKS = {DEADLY: "died", DULL: "slept"}  # that it was so
MORTAL = 1  # the rank


def serve_mortal(run: RunSpec, **arguments: Any) -> None:
    """Serve as this rank."""
    plain = Engine.carry_out
    engine_link.IDLE_S = 0.5  # the others are told more often than ranks may stand still
    (run.output_dir / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))

    def carry_out(self: Engine, order: StepOrder, *more: Any) -> Any:
        lengths = {len(sequence.tokens) for sequence in order.sequences}
        for length in lengths & MARKS.keys():
            mark = run.output_dir / MARKS[length]
            if self.rank == MORTAL and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL) if length == DEADLY else time.sleep(600)
        return plain(self, order, *more)

    Engine.carry_out = carry_out  # type: ignore[method-assign]
    engine_link.serve_rank(run, **arguments)
