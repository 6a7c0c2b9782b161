"""Measure what ranks pay to talk: pipeline transfers, all-reduces, adapter synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lobra.layout.shapes import ModelShape
from lobra.model.launch import DEFAULT_PRELOAD, run_ranks
from lobra.profiler.collectives import ALL_REDUCE, COLLECTIVE_COLUMNS, SYNC, TRANSFER
from lobra.profiler.effort import QUICK, THOROUGH, Effort
from lobra.profiler.layer_memory import element_bytes
from lobra.profiler.memory_rank import torch_device
from lobra.profiler.settings import shape_settings
from lobra.profiler.sweep_file import Restart, open_sweep
from lobra.profiler.sweep_rows import SweepFile
from lobra.profiler.timing import measured_timing

NUM_KEYS = 3
SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 23)  # bytes of a message
QUICK_SIZES = (1 << 14, 1 << 20)


def open_collectives(
    shape: ModelShape,
    path: Path,
    precision: str,
    device: str,
    restart: Restart,
    environment: dict[str, Any],
    quick: bool = False,
) -> SweepFile:
    """Open the CSV of collectives, new or to be continued (see `open_sweep`).

    ``quick``: of fewer sizes, timed for less long.
    """
    settings: dict[str, Any] = {
        "model": shape.name,
        "shape": shape_settings(shape),
        "what": "ms of one message, kinds transfer (one way), all_reduce, sync (sum and share)",
        "precision": precision,
        "device": device,
        "bytes_per_token": element_bytes(precision) * shape.hidden_size,
    }
    if quick:
        settings["quick"] = True
    return open_sweep(
        path,
        COLLECTIVE_COLUMNS,
        NUM_KEYS,
        settings,
        kind="measured",
        restart=restart,
        environment=environment,
    )


def wanted_rows(counts: Sequence[int], quick: bool = False) -> tuple[tuple[str, int, int], ...]:
    """Return the (kind, ranks, bytes) to measure for these numbers of ranks."""
    sizes = [(TRANSFER, 2)] + [(kind, n) for n in counts for kind in (ALL_REDUCE, SYNC)]
    return tuple(
        (kind, ranks, size) for kind, ranks in sizes for size in (QUICK_SIZES if quick else SIZES)
    )


def sweep_collectives(file: SweepFile, counts: Sequence[int], device: str) -> SweepFile:
    """Measure what the file lacks for the numbers of ranks, one process each; return it.

    As quickly as the file's settings say.

    Raises
    ------
    RankError
        If a rank failed; what was measured before is kept.
    """
    quick = bool(file.meta["settings"].get("quick"))
    for ranks in sorted({2, *counts}):
        missing = tuple(
            row for row in wanted_rows(counts, quick) if row[1] == ranks and row not in file.done
        )
        if missing:
            run_ranks(
                "lobra.profiler.collective_time:time_on_rank",
                ranks,
                {
                    "rows": missing,
                    "file": file,
                    "device": device,
                    "effort": QUICK if quick else THOROUGH,
                },
                device=device,
                preload=(*DEFAULT_PRELOAD, "lobra.profiler.collective_time"),
            )
            file = file.reopened()
    return file


def time_on_rank(
    rows: Sequence[tuple[str, int, int]], file: SweepFile, device: str, effort: Effort
) -> None:
    """Time each (kind, ranks, bytes) and append it (rank 0 writes). Collective."""
    where = torch_device(device)
    for kind, ranks, num_bytes in rows:
        timing = measured_timing([_message(kind, num_bytes, where)], where, effort)
        if dist.get_rank() == 0:
            time_ms = timing.time_ms / (2 if kind == TRANSFER else 1)
            file.add((kind, ranks, num_bytes, round(time_ms, 6)), timing.details())


def _message(kind: str, num_bytes: int, device: torch.device) -> Callable[[], None]:
    tensor = torch.zeros(num_bytes // 4, device=device)
    if kind == TRANSFER:
        return partial(_there_and_back, tensor)
    if kind == ALL_REDUCE:
        return partial(_all_reduce, tensor)
    shard = torch.zeros(-(-tensor.numel() // dist.get_world_size()), device=device)
    shards = [torch.zeros_like(shard) for _ in range(dist.get_world_size())]
    return partial(_sum_and_share, tensor, shard, shards)


def _there_and_back(tensor: torch.Tensor) -> None:
    """Rank 0 sends to rank 1, which sends it back: two transfers."""
    other = 1 - dist.get_rank()
    operations = (dist.isend, dist.irecv) if dist.get_rank() == 0 else (dist.irecv, dist.isend)
    for operation in operations:
        for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, other)]):
            work.wait()


def _all_reduce(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


def _sum_and_share(tensor: torch.Tensor, shard: torch.Tensor, shards: list[torch.Tensor]) -> None:
    """As ZeRO stage 1 does: sum the gradients everywhere, gather the updated partitions."""
    dist.all_reduce(tensor)
    dist.all_gather(shards, shard)
