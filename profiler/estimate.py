"""Profiles of a model on an accelerator that nobody has at hand: estimated, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lobra.layout.layout import MEMORY_POLICIES
from lobra.layout.shapes import ModelShape, layout_problem
from lobra.profiler.accelerators import Accelerator, Tables
from lobra.profiler.capacity import STEP_TOKENS
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.estimate_memory import Adapters, estimate_memory
from lobra.profiler.estimate_time import Workload, base_ms, head_ms, layer_ms
from lobra.profiler.grid import time_grid
from lobra.profiler.head import HeadProfile
from lobra.profiler.layer_fit import Kind
from lobra.profiler.profiles import DEFAULT_POLICY, MemoryProfile, MemoryRow, TimeProfile
from lobra.profiler.settings import model_settings
from lobra.tasks.config import TaskConfig

PRECISION = "bf16"
MOST_GPUS = 16  # of one replica: larger ones than published plans have are not looked at


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a model costs and what fits on an accelerator, with every memory policy."""

    cost_model: CostModel
    memory: MemoryProfile


def estimate(
    shape: ModelShape,
    accelerator: Accelerator,
    tables: Tables,
    tasks: Sequence[TaskConfig],
    *,
    num_gpus: int,
    gpus_per_node: int,
    max_seq_length: int,
    memory_share: float,
    kind: Kind = "fitted",
) -> Estimate:
    """Return what `lobra profile --estimate` would write for this project's runtime, in bf16.

    Of layouts whose tp and pp are powers of two, up to 16 GPUs.

    Parameters
    ----------
    num_gpus
        Most GPUs of a replica.
    max_seq_length
        Most tokens of a sequence, and of a micro-batch.
    memory_share
        The share of the accelerator's memory that is planned with.
    """
    runtime = tables.runtime(None)
    adapters = Adapters.of_tasks(tasks, shape)
    layouts = layouts_of(shape, min(num_gpus, MOST_GPUS))
    tps = sorted({tp for tp, _ in layouts})
    shapes = np.array(time_grid(max_seq_length))
    b, s = np.tile(shapes.T, len(tps))
    tp = np.repeat(tps, len(shapes))
    meta = {
        "kind": "estimated",
        "environment": {"hardware": {"name": accelerator.name}},
        "settings": model_settings(shape),
    }
    budget = memory_share * accelerator.memory_bytes
    largest = -(-max_seq_length // STEP_TOKENS) * STEP_TOKENS

    def times(of: Callable[..., np.ndarray], memory: str = DEFAULT_POLICY) -> np.ndarray:
        work = Workload(
            shape,
            accelerator,
            PRECISION,
            adapters.largest_rank,
            gpus_per_node,
            memory,
            runtime.sequence_parallel,
            runtime.keeps_elementwise,
            adapters.dropout_modules,
        )
        rows = [of(work, accelerator.efficiency, size, *shapes.T.astype(float)) for size in tps]
        return np.concatenate(rows)

    def max_tokens(tp: int, pp: int, memory: str) -> int:
        found = estimate_memory(shape, tp, pp, adapters, PRECISION, runtime, memory)
        return found.max_tokens(budget, STEP_TOKENS, largest)

    first, *others = (
        TimeProfile(tp, s, b, times(layer_ms, memory), meta=meta, memory=memory)
        for memory in MEMORY_POLICIES
    )
    head = HeadProfile(TimeProfile(tp, s, b, times(head_ms), meta=meta), times(base_ms))
    cost_model = fit_cost_model(first, shape.num_layers, kind, head, None, others)
    path = f"estimate for {accelerator.name}"
    rows = [
        MemoryRow(tp, pp, 1, max_tokens(tp, pp, memory), memory)
        for memory in MEMORY_POLICIES
        for tp, pp in layouts
    ]
    return Estimate(
        replace(cost_model, meta={"path": path, "digest": ""}),
        MemoryProfile(tuple(rows), Path(path), meta),
    )


def layouts_of(shape: ModelShape, num_gpus: int) -> list[tuple[int, int]]:
    """Return the (tp, pp) of at most so many GPUs, both powers of two, that can run the model."""
    powers = [1 << number for number in range(num_gpus.bit_length())]
    return [
        (tp, pp)
        for tp in powers
        for pp in powers
        if tp * pp <= num_gpus and layout_problem(shape, tp, pp) is None
    ]
