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
REPORTED = 32  # values that ranks tell each other in a step: of tasks and of ranks


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
        "what": "ms of: transfer (one way), all_reduce, sync (adapters: sum, update, share)",
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
    return _Synchronisation(tensor.numel(), device)


def _there_and_back(tensor: torch.Tensor) -> None:
    """Rank 0 sends to rank 1, which sends it back: two transfers."""
    other = 1 - dist.get_rank()
    operations = (dist.isend, dist.irecv) if dist.get_rank() == 0 else (dist.irecv, dist.isend)
    for operation in operations:
        for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, other)]):
            work.wait()


def _all_reduce(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor)


class _Synchronisation:
    """The end of a step, as training has it, of adapters with so many elements on every rank.

    ZeRO stage 1: a rank gets its part of the summed gradients, all agree on their norms, it updates
    its part of the weights, all agree that this went well, and every rank gets all parts.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        size = -(-elements // dist.get_world_size())
        self._gradients = torch.zeros(dist.get_world_size() * size, device=device)
        self._weights = torch.zeros_like(self._gradients)
        self._own = torch.nn.Parameter(torch.zeros(size, device=device))
        self._own.grad = torch.zeros_like(self._own)
        self._optimizer = torch.optim.AdamW([self._own])
        self._report = torch.zeros(REPORTED, dtype=torch.float64)
        self._group = dist.new_group(backend="gloo")  # ranks agree on the CPU

    @torch.no_grad()
    def __call__(self) -> None:
        assert self._own.grad is not None
        dist.reduce_scatter_tensor(self._own.grad, self._gradients.clone())
        self._report[0] = torch.linalg.vector_norm(self._own.grad, dtype=torch.float64).cpu()
        dist.all_reduce(self._report, group=self._group)
        dist.broadcast(self._report, src=0, group=self._group)
        self._optimizer.step()
        dist.all_reduce(self._report, group=self._group)
        gathered = torch.empty_like(self._gradients)
        dist.all_gather_into_tensor(gathered, self._own.detach())
        self._weights.copy_(gathered)
