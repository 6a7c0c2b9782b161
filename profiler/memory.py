"""The memory profiler: how many tokens a micro-batch may hold under each layout.

Every trial trains in processes of its own, so that running out of memory, or a crash, ends that
trial and not the sweep.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.layout.layout import Layout
from lobra.layout.shapes import ModelShape, layout_problem
from lobra.model.launch import DEFAULT_PRELOAD, run_ranks
from lobra.model.rank_results import RankError
from lobra.profiler.capacity import STEP_TOKENS, Parts, slope
from lobra.profiler.exchange import ADAPTER_BYTES, OPTIMIZER_BYTES, most_exchange_bytes
from lobra.profiler.search import Trial, largest_fitting
from lobra.profiler.settings import adapter_settings, adapter_specs, model_settings
from lobra.profiler.sidecar import write_meta
from lobra.profiler.sweep_rows import SweepFile
from lobra.tasks.config import TaskConfig

if TYPE_CHECKING:
    from lobra.profiler.memory_rank import RankMemory

log = logging.getLogger(__name__)

COUNTED = "training with the tasks' dropout, evaluation, the adapters' exchange"
SHORT_LENGTH = 256  # the "many short sequences" of a trial
# Stages may differ by so much from layers / pp: <1,3> of 32 layers (11, 11, 10) yes, of 4 no.
MAX_STAGE_IMBALANCE = 1.125
TRIAL_TIMEOUT_S = 1800.0
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|MemoryError|out of memory|can't allocate memory|bad_alloc"
    r"|Cannot allocate memory",
    re.IGNORECASE,
)
MEMORY_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class MemorySweep:
    """What to measure.

    Attributes
    ----------
    folder, shape
        The base model.
    tasks
        The tasks whose adapters are trained together.
    layouts
        (tp, pp) of every layout, see `layouts_within`.
    max_seq_length
        Tokens at most tried, a multiple of `STEP_TOKENS` (see `whole_steps`).
    budget_bytes
        Of one rank.
    precision, device
        "fp32" or "bf16"; "cpu" or "cuda".
    memory
        The memory policy (`lobra.layout.layout.MEMORY_POLICIES`).
    """

    folder: Path
    shape: ModelShape
    tasks: tuple[TaskConfig, ...]
    layouts: tuple[tuple[int, int], ...]
    max_seq_length: int
    budget_bytes: int
    precision: str
    device: str
    memory: str = "keep"

    def settings(self) -> dict[str, Any]:
        """Return what must agree for rows of two sweeps to be comparable."""
        return {
            **model_settings(self.shape),
            **adapter_settings(self.tasks),
            "counted": COUNTED,
            "max_seq_length": self.max_seq_length,
            "step_tokens": STEP_TOKENS,
            "memory_budget_bytes": self.budget_bytes,
            "precision": self.precision,
            "device": self.device,
        }


@dataclass(frozen=True)
class LayoutResult:
    """A layout's capacity in tokens with the trials that found it, or why there is none."""

    tp: int
    pp: int
    max_tokens: int | None
    trials: tuple[Trial, ...] = ()
    failure: str = ""


def layouts_within(shape: ModelShape, num_gpus: int) -> tuple[tuple[int, int], ...]:
    """Return every sensible layout (tp, pp) of at most ``num_gpus`` ranks, ordered.

    tp divides the heads; pp divides the layers, or nearly: the longest stage has at most an eighth
    more layers than layers / pp.
    """
    found = []
    for tp in range(1, num_gpus + 1):
        for pp in range(1, num_gpus // tp + 1):
            longest = -(-shape.num_layers // pp)
            if (
                layout_problem(shape, tp, pp) is None
                and longest * pp <= MAX_STAGE_IMBALANCE * shape.num_layers
            ):
                found.append((tp, pp))
    return tuple(found)


def parse_bytes(text: str) -> int:
    """Return the bytes of "600MB", "1.5GiB", "2G" or a plain number (units of 1024).

    Raises
    ------
    ConfigError
        If it is none of these or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * MEMORY_UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"memory budget {text!r}: a size such as 600MB or 40GB is expected")
    return size


def whole_steps(tokens: int) -> int:
    """Return ``tokens`` rounded up to a multiple of `STEP_TOKENS`: what holds that many."""
    return -(-tokens // STEP_TOKENS) * STEP_TOKENS


def trial_shapes(tokens: int) -> tuple[tuple[int, int], ...]:
    """Return the micro-batches (b, s) of ``tokens`` tokens tried: one long sequence, many short."""
    shapes = [(1, tokens)]
    if tokens > SHORT_LENGTH:
        shapes.append((tokens // SHORT_LENGTH, SHORT_LENGTH))
    return tuple(shapes)


def sweep_memory(
    sweep: MemorySweep,
    file: SweepFile,
    report: Callable[[LayoutResult], None] = lambda result: None,
    measure: Callable[[MemorySweep, int, int, int], Sequence[RankMemory]] | None = None,
) -> tuple[LayoutResult, ...]:
    """Measure every layout that the file does not hold yet; return what was measured now.

    A layout whose trial failed for another reason than memory is returned with its failure; the
    others go on. A layout that was interrupted goes on with the trials that had ended.

    Parameters
    ----------
    file
        Rows ``tp,pp,sp,max_tokens`` are appended to it; sp is 1, the memory policy the sweep's.
        Its sidecar keeps the trials of the layouts without a row.
    report
        Called after each layout.
    measure
        ``measure(sweep, tp, pp, tokens)`` gives each rank's memory; real processes by default.
    """
    results = []
    trials: dict[str, list[list[Any]]] = file.meta.setdefault("trials", {})
    for tp, pp in sweep.layouts:
        name = file.name((tp, pp))
        if (tp, pp, 1) in file.done:
            if trials.pop(name, None) is not None:  # killed just after its row was written
                write_meta(file.path, file.meta)
            continue
        kept = trials.setdefault(name, [])
        result = _measure_layout(sweep, tp, pp, measure or measure_trial, file, kept)
        if result.max_tokens is not None:
            details: dict[str, Any] = {
                "trials": [[t.size, t.peak_bytes, t.reason or "fits"] for t in result.trials],
            }
            if parts := _parts(kept, tp, sweep.budget_bytes):
                details["parts"] = parts.as_json()
            file.add((tp, pp, 1, result.max_tokens), details)
            del trials[name]
            write_meta(file.path, file.meta)
        results.append(result)
        report(result)
    return tuple(results)


def _measure_layout(
    sweep: MemorySweep,
    tp: int,
    pp: int,
    measure: Callable[[MemorySweep, int, int, int], Sequence[RankMemory]],
    file: SweepFile,
    kept: list[list[Any]],
) -> LayoutResult:
    """Search the layout's capacity; `kept`, a part of the sidecar, are its trials so far."""

    def kept_trial(tokens: int) -> Trial:
        for size, peak, reason, *_ in kept:
            if size == tokens:
                return Trial(size, not reason, peak, reason)
        outcome, rank = trial(tokens)
        parts = [] if rank is None else [rank.weight_bytes, rank.elements, rank.activation_bytes]
        kept.append([outcome.size, outcome.peak_bytes, outcome.reason, *parts])
        if not file.path.is_file():  # a sidecar is continued only beside its CSV
            write_atomic(file.path, ",".join(file.header) + "\n")
        write_meta(file.path, file.meta)
        return outcome

    def trial(tokens: int) -> tuple[Trial, RankMemory | None]:
        try:
            ranks = measure(sweep, tp, pp, tokens)
        except RankError as error:
            if not OUT_OF_MEMORY.search(str(error)):
                raise
            log.info("<%d,%d> with %d tokens ran out of memory", tp, pp, tokens)
            return Trial(tokens, False, None, "ran out of memory"), None
        most = max(ranks, key=lambda rank: rank.total_bytes)
        peak = most.total_bytes
        log.debug("<%d,%d> with %d tokens takes %.1f MiB", tp, pp, tokens, peak / (1 << 20))
        fits = peak <= sweep.budget_bytes
        return Trial(tokens, fits, peak, "" if fits else "over the memory budget"), most

    try:
        tokens, trials = largest_fitting(
            kept_trial, STEP_TOKENS, sweep.max_seq_length, sweep.budget_bytes
        )
    except RankError as error:
        log.warning("<%d,%d> failed: %s", tp, pp, error)
        return LayoutResult(tp, pp, None, failure=str(error).strip())
    return LayoutResult(tp, pp, tokens, trials)


def _parts(kept: Sequence[Sequence[Any]], tp: int, budget_bytes: int) -> Parts | None:
    """Return a layout's parts by its trials (size, peak, reason, parts), None if all died.

    Of the rank that needed most in the trial nearest to the budget.
    """
    known = [trial for trial in kept if len(trial) > 3]
    if not known:
        return None
    size, _, _, weight_bytes, elements, activation_bytes = min(
        known, key=lambda trial: abs(trial[1] - budget_bytes)
    )
    alike = [trial for trial in known if tuple(trial[3:5]) == (weight_bytes, elements)]
    alike.sort(key=lambda trial: trial[0] != size)
    return Parts(
        weight_bytes=weight_bytes,
        elements=elements,
        bytes_per_element=ADAPTER_BYTES + OPTIMIZER_BYTES / tp,
        exchange_bytes_per_element=most_exchange_bytes(elements, tp) / max(1, elements),
        tokens=size,
        activation_bytes=activation_bytes,
        bytes_per_token=slope([t[0] for t in alike], [t[5] for t in alike]),
    )


def measure_trial(sweep: MemorySweep, tp: int, pp: int, tokens: int) -> list[RankMemory]:
    """Train one replica of <tp,pp> in tp * pp new processes; return each rank's memory.

    Raises
    ------
    RankError
        If a rank died or raised; running out of memory is one of the reasons.
    """
    layout = Layout(tp, pp, memory=sweep.memory)
    return run_ranks(
        "lobra.profiler.memory_rank:memory_of_rank",
        layout.num_gpus,
        {
            "folder": sweep.folder,
            "layout": layout,
            "specs": adapter_specs(sweep.tasks),
            "shapes": trial_shapes(tokens),
            "precision": sweep.precision,
            "device": sweep.device,
            "budget_bytes": sweep.budget_bytes,
            "base_precision": sweep.shape.quantised,
        },
        device=sweep.device,
        timeout_s=TRIAL_TIMEOUT_S,
        threads=1 if sweep.device == "cpu" else None,
        preload=(*DEFAULT_PRELOAD, "lobra.profiler.memory_rank"),
    )
