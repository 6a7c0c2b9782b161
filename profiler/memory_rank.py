"""One trial of the memory profiler on one rank: train micro-batches of a size, report the peak.

Shape suffixes: B rows, S positions.
"""

from __future__ import annotations

import resource
from collections import abc
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lobra.layout.layout import Layout
from lobra.layout.sequences import MicroBatch, Sequence
from lobra.layout.shapes import ModelShape
from lobra.layout.world import one_replica
from lobra.model.adapter import AdapterSpec
from lobra.model.groups import build_groups
from lobra.model.host_memory import return_freed_memory
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors
from lobra.model.pipeline import evaluate_replica, run_replica
from lobra.model.precision import DTYPES
from lobra.model.stage import Stage, build_stage
from lobra.profiler.exchange import ADAPTER_BYTES, OPTIMIZER_BYTES, most_exchange_bytes
from lobra.profiler.peak_memory import peak_bytes_of, status_bytes

WARM_UP_SHAPE = (1, 16)
# A trial that needs more than this multiple of its budget fails to allocate rather than take the
# machine down with it.
RUNAWAY_FACTOR, RUNAWAY_EXTRA_BYTES = 3, 512 << 20


@dataclass(frozen=True)
class RankMemory:
    """What one rank took, in bytes.

    Attributes
    ----------
    weight_bytes
        Frozen weights, those of adapters included.
    adapter_bytes
        Adapters and their gradients.
    optimizer_bytes
        The optimiser's state (computed, not run): master copy and moments, shared by the tp ranks.
    activation_bytes
        The most that training or evaluation took beyond those, measured, and the adapters' copies
        in the activations' dtype.
    exchange_bytes
        The most that exchanging gradients and weights takes beyond the first three (computed, see
        `exchange`); activations are not alive then.
    """

    weight_bytes: int
    adapter_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    exchange_bytes: int = 0

    @property
    def elements(self) -> int:
        """Return the adapters' parameters on this rank."""
        return self.adapter_bytes // ADAPTER_BYTES

    @property
    def total_bytes(self) -> int:
        """Return the most that is taken at any time of a step."""
        always = self.weight_bytes + self.adapter_bytes + self.optimizer_bytes
        return always + max(self.activation_bytes, self.exchange_bytes)


def memory_of_rank(
    folder: Path,
    layout: Layout,
    specs: tuple[AdapterSpec, ...],
    shapes: tuple[tuple[int, int], ...],
    precision: str,
    device: str,
    budget_bytes: int,
    base_precision: str | None = None,
) -> RankMemory:
    """Train one replica with as many micro-batches in flight as it has stages; return the peak.

    Every position carries a loss, the most the head can be asked for; adapters drop out as their
    specs say; the same micro-batches are then evaluated. Collective.

    Parameters
    ----------
    layout
        Of the replica.
    shapes
        (B, S) of the micro-batches to try one after the other; the larger peak counts.
    budget_bytes
        On a CPU, a rank that would need far more than this fails to allocate.
    base_precision
        What the base's linears are kept in, as `build_stage` has it.
    """
    if device == "cpu":
        return_freed_memory()
        _limit_memory(budget_bytes)
    groups = build_groups(one_replica(layout))
    stage = build_stage(
        folder,
        groups,
        dict(enumerate(specs)),
        dtype=DTYPES[precision],
        device=torch_device(device),
        base_precision=base_precision,
    )
    elements = sum(slot.weights.numel() for slot in stage.slots.values())
    for run in (_train, _evaluate):  # libraries load and buffers are made on first use
        run(stage, WARM_UP_SHAPE)
    activation_bytes = max(
        peak_bytes_of(partial(run, stage, shape), device)
        for shape in shapes
        for run in (_train, _evaluate)
    )
    return RankMemory(
        weight_bytes=stage.base_bytes + sum(slot.frozen_bytes for slot in stage.slots.values()),
        adapter_bytes=ADAPTER_BYTES * elements,
        optimizer_bytes=OPTIMIZER_BYTES * elements // layout.tp,
        activation_bytes=activation_bytes + sum(stack.copied_bytes for stack in stage.stacks),
        exchange_bytes=most_exchange_bytes(elements, layout.tp),
    )


def _train(stage: Stage, shape: tuple[int, int]) -> None:
    """Forward and backward of one micro-batch of `shape` per pipeline stage."""
    run_replica(stage, _batches(stage, shape), len(stage.slots))


def _evaluate(stage: Stage, shape: tuple[int, int]) -> None:
    """Forward only of one micro-batch of `shape` per pipeline stage."""
    evaluate_replica(stage, _batches(stage, shape), len(stage.slots))


def _batches(stage: Stage, shape: tuple[int, int]) -> list[MicroBatchTensors]:
    """Return a micro-batch per stage; fewer rows than tasks are of those that keep most."""
    specs = [slot.spec for slot in stage.slots.values()]
    row_tasks = None
    if shape[0] < len(specs):
        order = sorted(range(len(specs)), key=lambda task: -_kept_size(specs[task], stage.shape))
        row_tasks = sorted(order[: shape[0]])
    return [synthetic_batch(shape, stage, row_tasks)] * stage.groups.place.layout.pp


def _kept_size(spec: AdapterSpec, shape: ModelShape) -> int:
    """Return about how many numbers a layer keeps of a token for an adapter."""
    modules = shape.layer_modules(spec.target_modules)
    inputs = sum(shape.linear_sizes()[module][0] for module in modules)
    return spec.largest_rank * len(modules) + inputs


def synthetic_batch(
    shape: tuple[int, int],
    stage: Stage,
    row_tasks: abc.Sequence[int] | None = None,
    target_fraction: float = 1.0,
    packed: bool = False,
) -> MicroBatchTensors:
    """Return a micro-batch of random tokens, dropout included.

    Parameters
    ----------
    shape
        (B, S).
    stage
        What it is for; the tasks of its adapters count from 0.
    row_tasks
        Whose each row is; by default rows are shared out to the tasks.
    target_fraction
        Of each row's positions the last that carry a loss.
    packed
        Lay the rows end to end, as sequences of one row.
    """
    num_rows, length = shape
    num_tasks = len(stage.slots)
    if row_tasks is None:
        row_tasks = [row * num_tasks // max(num_rows, num_tasks) for row in range(num_rows)]
    generator = np.random.default_rng(num_rows * 1_000_003 + length)
    tokens_BS = generator.integers(0, stage.shape.vocab_size, shape, dtype=np.int32)
    first = max(1, length - max(1, round(target_fraction * length)))  # nothing precedes a row's 0
    targets = np.arange(first, length, dtype=np.int32)
    rows = tuple(
        Sequence(task, row, tokens_BS[row], targets, noise_seed=row)
        for row, task in enumerate(row_tasks)
    )
    weights = np.full(num_tasks, 1.0 / (num_rows * length))
    return micro_batch_tensors(
        [MicroBatch(rows, None if packed else length)],
        weights,
        stage.device,
        stage.dtype,
        stage.dropouts,
    )[0]


def torch_device(device: str) -> torch.device:
    """Return this rank's device of the kind "cpu" or "cuda"."""
    if device == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _limit_memory(budget_bytes: int) -> None:
    """Let this process allocate only so much more than it has (private, writable memory)."""
    limit = status_bytes("VmData") + RUNAWAY_FACTOR * budget_bytes + RUNAWAY_EXTRA_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
