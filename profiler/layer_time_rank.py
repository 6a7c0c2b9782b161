"""Timing on a rank: one layer's forward and backward, and embedding and head, as trained.

Shape suffixes: B rows, S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lobra.layout.shapes import read_shape
from lobra.layout.world import World
from lobra.model.adapter import AdapterSpec
from lobra.model.groups import ReplicaGroups, build_groups
from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.precision import DTYPES
from lobra.model.stage import Stage, build_stage
from lobra.model.token_tasks import TokenTasks
from lobra.profiler.effort import THOROUGH, Effort
from lobra.profiler.head import PROFILED_SHARE
from lobra.profiler.memory_rank import synthetic_batch, torch_device
from lobra.profiler.outliers import doubtful_shapes, record_attempt
from lobra.profiler.sweep_rows import SweepFile
from lobra.profiler.timing import measured_timing

PROBE_LAYERS = 4  # timed together, so that what a stage does once is shared out as in training
NUM_MIXTURES = 4  # in so many ways a micro-batch is mixed of tasks whose adapters differ


@dataclass(frozen=True)
class SingleDevice:
    """One device computes one shard of a tensor-parallel group; the rest is modelled.

    Attributes
    ----------
    tp
        The size of the group whose shard is timed.
    layer_ms, head_ms
        (fixed, per token) ms of the collectives of a layer, and of embedding and head.
    """

    tp: int
    layer_ms: tuple[float, float]
    head_ms: tuple[float, float]


def time_shapes_on_rank(
    folder: Path,
    world: World,
    specs: tuple[AdapterSpec, ...],
    shapes: tuple[tuple[int, int], ...],
    precision: str,
    device: str,
    layer_file: SweepFile,
    head_file: SweepFile,
    single_device: SingleDevice | None = None,
    task_weights: Sequence[float] = (),
    effort: Effort = THOROUGH,
    base_precision: str | None = None,
) -> None:
    """Time every shape that the files do not hold and append it to them (rank 0 writes).

    All replicas of ``world`` run the same shape at the same time, each a tensor-parallel group on
    its own; the mean over them is recorded. Rows that then stick out (`doubtful_shapes`) are timed
    again, as often as the effort allows, and become the median of their attempts. Collective.

    Parameters
    ----------
    world
        Replicas of <tp,1>, all of the same tp and memory policy: with "full" the backward pass
        computes layers again, and that is timed too.
    shapes
        (b, s) in the order they are measured.
    layer_file, head_file
        Rows ``tp,seq_len,mbs,time``; only rank 0's copies are written to.
    single_device
        Time one shard on this one rank, and add the collectives from a model.
    task_weights
        How often a row is of each task (`row_mixtures`); empty: all alike.
    effort
        How often a shape is run.
    base_precision
        What the base's linears are kept in, as `build_stage` has it.
    """
    tp = world.layouts[0].tp
    groups = build_groups(world)
    if single_device is not None:
        tp = single_device.tp
        layout = replace(groups.place.layout, tp=tp)
        groups = replace(groups, place=replace(groups.place, layout=layout))
    where = torch_device(device)
    layers, head = _build_probes(folder, groups, specs, DTYPES[precision], where, base_precision)
    packed_batch = partial(synthetic_batch, packed=True)  # as is trained by default
    mixtures_wanted = NUM_MIXTURES if _adapters_differ(specs) else 1
    weights = task_weights or [1.0] * len(specs)

    def time_layer(b: int, s: int, received_BSD: torch.Tensor) -> None:
        gradient_BSD = torch.randn_like(received_BSD)
        runs = [
            _layer_run(layers, packed_batch((b, s), layers, tasks), received_BSD, gradient_BSD)
            for tasks in row_mixtures(b, weights, mixtures_wanted)
        ]
        timing = measured_timing(runs, where, effort)
        modelled_ms = None if single_device is None else _line(single_device.layer_ms, b * s)
        if dist.get_rank() == 0:
            time_ms = timing.time_ms / len(layers.layers) + (modelled_ms or 0.0)
            record_attempt(layer_file, (tp, s, b), (), time_ms, timing.details(modelled_ms))

    def time_head(b: int, s: int, batch: MicroBatchTensors, received_BSD: torch.Tensor) -> None:
        nothing = replace(batch, targets=batch.targets.none())
        base, timing = (
            measured_timing([_head_run(layers, head, one, received_BSD)], where, effort, 0.5)
            for one in (nothing, batch)
        )
        modelled_ms = None if single_device is None else _line(single_device.head_ms, b * s)
        if dist.get_rank() == 0:
            time_ms = timing.time_ms + (modelled_ms or 0.0)
            base_ms = round(min(base.time_ms + (modelled_ms or 0.0), time_ms), 6)
            record_attempt(head_file, (tp, s, b), (base_ms,), time_ms, timing.details(modelled_ms))

    def time_shape(b: int, s: int, layer_too: bool, head_too: bool) -> None:
        batch = packed_batch((b, s), layers, target_fraction=PROFILED_SHARE)
        if single_device is not None:  # the other shards' rows of the embedding are not here
            batch = replace(batch, tokens_BS=batch.tokens_BS % len(_embedding_rows(layers)))
        size = (*batch.tokens_BS.shape, layers.shape.hidden_size)
        received_BSD = torch.randn(size, device=where).to(layers.dtype)
        if layer_too:
            time_layer(b, s, received_BSD)
        if head_too:
            time_head(b, s, batch, received_BSD)

    for b, s in shapes:
        key = tp, s, b
        time_shape(b, s, key not in layer_file.done, key not in head_file.done)
    for _ in range(effort.attempts - 1):
        doubtful_layers, doubtful_heads = _agreed_doubtful(tp, layer_file, head_file)
        for b, s in sorted(doubtful_layers | doubtful_heads):
            time_shape(b, s, (b, s) in doubtful_layers, (b, s) in doubtful_heads)


def _agreed_doubtful(tp: int, *files: SweepFile) -> list[set[tuple[int, int]]]:
    """Return, of each file, the shapes to time again: as rank 0 sees it, who writes the files."""
    writes = dist.get_rank() == 0
    found = [doubtful_shapes(file, tp) if writes else set() for file in files]
    dist.broadcast_object_list(found, src=0)
    return found


def row_mixtures(
    num_rows: int, weights: Sequence[float], count: int
) -> tuple[tuple[int, ...], ...]:
    """Return ``count`` ways to fill a micro-batch's rows with tasks, each in task order.

    A row is of task t with probability proportional to ``weights[t]``: together the mixtures hold
    each task as often as that says; each by itself is as mixed as chance makes it. The same
    everywhere and always.
    """
    edges = np.cumsum(weights) / np.sum(weights)
    slots = (np.arange(num_rows * count) + 0.5) / (num_rows * count)
    tasks = np.minimum(np.searchsorted(edges, slots, side="right"), len(edges) - 1)
    drawn = np.random.default_rng(num_rows).permutation(tasks).reshape(count, num_rows)
    return tuple(tuple(int(task) for task in sorted(row)) for row in drawn)


def _adapters_differ(specs: Sequence[AdapterSpec]) -> bool:
    kinds = {
        (spec.kind, spec.largest_rank, frozenset(spec.target_modules), spec.dropout > 0.0)
        for spec in specs
    }
    return len(kinds) > 1


def _line(fixed_and_slope: tuple[float, float], tokens: int) -> float:
    return fixed_and_slope[0] + fixed_and_slope[1] * tokens


def _embedding_rows(stage: Stage) -> range:
    rows: range = stage.decoder.embed_tokens.rows
    return rows


def _build_probes(
    folder: Path,
    groups: ReplicaGroups,
    specs: tuple[AdapterSpec, ...],
    dtype: torch.dtype,
    device: torch.device,
    base_precision: str | None,
) -> tuple[Stage, Stage]:
    """Return a stage with the embedding and a few layers, and one with the head.

    They are the first and the last stage of a pipeline whose other stages are not there; nothing
    is ever sent. A model of few layers is one stage that has both.
    """
    num_layers = read_shape(folder).num_layers
    num_stages = max(1, num_layers // PROBE_LAYERS)

    def stage(index: int, count: int) -> Stage:
        layout = replace(groups.place.layout, pp=count)
        place = replace(groups.place, stage=index, layout=layout)
        numbered = dict(enumerate(specs))
        own = replace(groups, place=place)
        return build_stage(
            folder, own, numbered, dtype=dtype, device=device, base_precision=base_precision
        )

    if num_stages == 1:
        whole = stage(0, 1)
        return whole, whole
    return stage(0, num_stages), stage(num_layers - 1, num_layers)


def _layer_run(
    layers: Stage, batch: MicroBatchTensors, received_BSD: torch.Tensor, gradient_BSD: torch.Tensor
) -> Callable[[], None]:
    def run() -> None:
        received_BSD.grad = None
        received_BSD.requires_grad_(True)
        layers.hidden(batch, received_BSD).backward(gradient_BSD)

    return run


def _head_run(
    embedding: Stage, head: Stage, batch: MicroBatchTensors, received_BSD: torch.Tensor
) -> Callable[[], None]:
    def run() -> None:
        embedding.selection.tasks = head.selection.tasks = TokenTasks(batch.segments, batch.noise)
        embedding.decoder.embed_tokens(batch.tokens_BS)
        hidden_BSD = received_BSD.detach().requires_grad_(True)
        weighted, _ = head.loss(head.decoder.norm(hidden_BSD), batch)
        weighted.backward()

    return run
