"""Timing on a rank: one layer's forward and backward, and embedding and head, as trained.

Shape suffixes: B rows, S positions, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.groups import ReplicaGroups, build_groups
from model.lora import AdapterSpec
from model.shapes import read_shape
from model.stage import MicroBatchTensors, Stage, build_stage
from model.topology import Grid
from profiler.memory_rank import DTYPES, synthetic_batch, torch_device
from profiler.sweep_file import SweepFile

PROBE_LAYERS = 4  # timed together, so that what a stage does once is shared out as in training
MIN_REPEATS, MAX_REPEATS = 3, 30
MIN_TIMED_S = 0.8  # of all repeats of a point together, where 3 to 30 repeats allow it
TARGET_FRACTION = 0.5  # of the positions carry a loss: prompts and padding do not


@dataclass(frozen=True)
class Timing:
    """A robust time: the median in ms, and the interquartile range as a share of it."""

    time_ms: float
    spread: float
    repeats: int


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


def time_points_on_rank(
    folder: Path,
    grids: tuple[Grid, ...],
    specs: tuple[AdapterSpec, ...],
    points: tuple[tuple[int, int], ...],
    precision: str,
    device: str,
    layer_file: SweepFile,
    head_file: SweepFile,
    again: bool = False,
    single_device: SingleDevice | None = None,
) -> None:
    """Time every point that the files do not hold and append it to them (rank 0 writes).

    All replicas of ``grids`` run the same point at the same time, each a tensor-parallel group on
    its own; the mean over them is recorded. Collective.

    Parameters
    ----------
    grids
        Replicas of <tp,1>, all of the same tp.
    points
        (b, s) in the order they are measured.
    layer_file, head_file
        Rows ``tp,seq_len,mbs,time``; only rank 0's copies are written to.
    again
        Time the points once more although the files hold them; a row becomes the median of all
        its attempts.
    single_device
        Time one shard on this one rank, and add the collectives from a model.
    """
    tp = len(grids[0][0])
    groups = build_groups(grids)
    if single_device is not None:
        tp = single_device.tp
        groups = replace(groups, role=replace(groups.role, tp_size=tp))
    where = torch_device(device)
    layers, ends = _build_probes(folder, groups, specs, DTYPES[precision], where)
    for b, s in points:
        batch = synthetic_batch((b, s), layers.shape, len(specs), where, TARGET_FRACTION)
        if single_device is not None:  # the other shards' rows of the embedding are not here
            batch = replace(batch, tokens_BS=batch.tokens_BS % len(_embedding_rows(layers)))
        received_BSD = torch.randn(b, s, layers.shape.hidden_size, device=where).to(layers.dtype)
        gradient_BSD = torch.randn_like(received_BSD)
        for file, run, share, modelled in (
            (
                layer_file,
                _layer_run(layers, batch, received_BSD, gradient_BSD),
                len(layers.layers),
                (0.0, 0.0) if single_device is None else single_device.layer_ms,
            ),
            (
                head_file,
                _ends_run(layers, ends, batch, received_BSD),
                1,
                (0.0, 0.0) if single_device is None else single_device.head_ms,
            ),
        ):
            if (tp, s, b) in file.done and not again:
                continue
            timing = measured_timing(run, where)
            if dist.get_rank() == 0:
                collectives_ms = modelled[0] + modelled[1] * b * s
                time_ms = timing.time_ms / share + collectives_ms
                details = {"spread": round(timing.spread, 4), "repeats": timing.repeats}
                if single_device is not None:
                    details["modelled_collectives_ms"] = round(collectives_ms, 6)
                _record(file, (tp, s, b), time_ms, details)


def _embedding_rows(stage: Stage) -> range:
    rows: range = stage.decoder.embed_tokens.rows
    return rows


def _record(
    file: SweepFile, key: tuple[int, int, int], time_ms: float, details: dict[str, Any]
) -> None:
    """Append a row, or make one measured before the median of all its attempts."""
    attempts = [round(time_ms, 6)]
    if key not in file.done:
        file.add((*key, attempts[0]), details)
        return
    before = file.details(key)
    attempts = [*before.get("attempts", [float(file.done[key][-1])]), *attempts]
    spread = min(before.get("spread", details["spread"]), details["spread"])
    revised = before | details | {"attempts": attempts, "spread": spread}
    file.revise((*key, round(float(np.median(attempts)), 6)), revised)


def _build_probes(
    folder: Path,
    groups: ReplicaGroups,
    specs: tuple[AdapterSpec, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Stage, Stage]:
    """Return a stage with the embedding and a few layers, and one with the head.

    They are the first and the last stage of a pipeline whose other stages are not there; nothing
    is ever sent. A model of few layers is one stage that has both ends.
    """
    num_layers = read_shape(folder).num_layers
    num_stages = max(1, num_layers // PROBE_LAYERS)

    def stage(index: int, count: int) -> Stage:
        role = replace(groups.role, stage=index, num_stages=count)
        return build_stage(folder, replace(groups, role=role), specs, dtype=dtype, device=device)

    if num_stages == 1:
        both = stage(0, 1)
        return both, both
    return stage(0, num_stages), stage(num_layers - 1, num_layers)


def _layer_run(
    stage: Stage, batch: MicroBatchTensors, received_BSD: torch.Tensor, gradient_BSD: torch.Tensor
) -> Callable[[], None]:
    def run() -> None:
        received_BSD.grad = None
        received_BSD.requires_grad_(True)
        stage.hidden(batch, received_BSD).backward(gradient_BSD)

    return run


def _ends_run(
    first: Stage, last: Stage, batch: MicroBatchTensors, received_BSD: torch.Tensor
) -> Callable[[], None]:
    def run() -> None:
        first.decoder.embed_tokens(batch.tokens_BS)
        hidden_BSD = received_BSD.detach().requires_grad_(True)
        weighted, _ = last.loss(last.decoder.norm(hidden_BSD), batch)
        weighted.backward()

    return run


def measured_timing(run: Callable[[], None], device: torch.device) -> Timing:
    """Time a collective function: warm-up, then as many repeats as rank 0 finds worthwhile.

    Each rank takes the median of its repeats; the mean over all ranks is returned, everywhere.
    """
    run()
    _wait(device)
    warm_s = _timed(run, device)
    repeats = int(np.clip(MIN_TIMED_S / max(warm_s, 1e-6), MIN_REPEATS, MAX_REPEATS))
    chosen = torch.tensor([repeats], device=device)
    dist.broadcast(chosen, src=0)
    repeats = int(chosen.item())
    dist.barrier()
    times_ms = 1e3 * np.array([_timed(run, device) for _ in range(repeats)])
    low, median, high = np.percentile(times_ms, (25, 50, 75))
    statistics = torch.tensor([median, (high - low) / median], dtype=torch.float32, device=device)
    dist.all_reduce(statistics)
    statistics /= dist.get_world_size()
    return Timing(float(statistics[0]), float(statistics[1]), repeats)


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds one run takes."""
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
