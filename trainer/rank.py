"""One rank of a training run: rank 0 coordinates, the others follow."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lobra.trainer.checkpoint import read_state
from lobra.trainer.coordinator import Coordinator
from lobra.trainer.engine import Engine
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.signals import StopRequest


@dataclass
class RankResult:
    """What a rank reports at the end.

    Attributes
    ----------
    rank
        Its number in the world.
    loaded_bytes, held_bytes
        What it read of the base model, and what it keeps of it.
    peak_memory_bytes
        The most memory it has had in use.
    stopped_at
        The steps made by a run that was ended early; None if it came to its end.
    stop_signal
        What ended it early.
    next_plan
        On rank 0, the plan that the run is to go on on, if it ended for that.
    """

    rank: int
    loaded_bytes: int
    held_bytes: int
    peak_memory_bytes: int
    stopped_at: int | None = None
    stop_signal: int | None = None
    next_plan: Path | None = None


def train_rank(run: RunSpec) -> RankResult:
    """Train `run` as this rank of an initialised world and return what it did. Collective."""
    if run.deterministic:
        _repeat_bits()
    with StopRequest() as stop:
        resumed = None
        if run.resume_step is not None and dist.get_rank() == 0:
            resumed = read_state(run.output_dir, run.resume_step, whole=False)
        engine = Engine(run, resumed, lambda: stop.received is not None)
        coordinator = Coordinator(run, engine, resumed) if engine.rank == 0 else None
        last = engine.follow() if coordinator is None else coordinator.train()
        return RankResult(
            engine.rank,
            engine.stage.loaded_bytes,
            engine.stage.base_bytes,
            _peak_memory_bytes(engine),
            stopped_at=None if last.finished else last.step,
            stop_signal=None if last.finished else stop.received or signal.SIGTERM,
            next_plan=None if coordinator is None else coordinator.next_plan_file,
        )


def _repeat_bits() -> None:
    """Have torch use algorithms only that give the same bits every time; others raise."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for that
    torch.use_deterministic_algorithms(True)
    # No tensor is read before it is written. (Stubs lack the attribute.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _peak_memory_bytes(engine: Engine) -> int:
    if engine.device.type == "cuda":  # its counter starts anew with every report
        return max(engine.peak_memory_bytes, torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
