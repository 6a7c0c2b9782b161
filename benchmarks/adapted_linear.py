"""One linear layer with the adapters of several tasks: ours against its formula in plain torch.

Forward and backward of a frozen layer on a micro-batch whose rows are of 1, 4 or 12 tasks, each
with an adapter. "Plain" slices the rows of each task, adds the low-rank update and joins the parts,
and leaves the rest to autograd. Both are run in turn; the rows are medians and their ratio. Twelve
rows of four tokens show what a call costs by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from lobra.model.lora import Adapter, MultiAdapterLinear, RowTasks, Shard, row_segments

SIZES = ((12, 4, 16, 16, 4), (24, 128, 512, 512, 16), (24, 128, 512, 1376, 16))  # B, S, I, O, rank


def plain(linear: MultiAdapterLinear, x_BSi: torch.Tensor) -> torch.Tensor:
    """Return what `linear` computes, written with slices."""
    y_BSo = functional.linear(x_BSi, linear.weight)
    parts = []
    for segment in linear.row_tasks.segments:
        adapter, rows = linear.adapters[segment.task], slice(segment.start, segment.stop)
        low = functional.linear(x_BSi[rows], adapter.A)
        parts.append(y_BSo[rows] + functional.linear(low, adapter.B * adapter.scaling))
    return torch.cat(parts)


def make(
    size: tuple[int, ...], num_tasks: int, device: str
) -> tuple[MultiAdapterLinear, torch.Tensor, torch.Tensor]:
    """Return the layer, its input and the gradient of its output."""
    num_rows, length, inputs, outputs, rank = size
    row_tasks = [row * num_tasks // num_rows for row in range(num_rows)]
    linear = MultiAdapterLinear(
        torch.randn(outputs, inputs, device=device),
        None,
        Shard(range(inputs), range(outputs), inputs, outputs),
        None,
        RowTasks(row_segments(row_tasks)),
    )
    for task in range(num_tasks):
        A = torch.nn.Parameter(torch.randn(rank, inputs, device=device))
        B = torch.nn.Parameter(torch.randn(outputs, rank, device=device))
        linear.adapters[task] = Adapter(A, B, 1.0)
    x_BSi = torch.randn(num_rows, length, inputs, device=device, requires_grad=True)
    return linear, x_BSi, torch.randn(num_rows, length, outputs, device=device)


def seconds(run: Callable[[], None], device: str) -> float:
    """Return what one run takes."""
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def adapted_linear(
    *, device: Literal["cpu", "cuda"] = "cpu", repeats: int = 200
) -> Iterator[dict[str, Any]]:
    """Time one linear layer with the adapters of several tasks, against plain torch.

    Parameters
    ----------
    device
        Where the layer is.
    repeats
        Of forward and backward; ten times as many of the smallest size.
    """
    for size in SIZES:
        for num_tasks in (1, 4, 12):
            linear, x_BSi, dy_BSo = make(size, num_tasks, device)
            runs = [
                lambda f=function, x=x_BSi, dy=dy_BSo: f(x).backward(dy)
                for function in (linear, partial(plain, linear))
            ]
            count = repeats * (10 if size[1] < 16 else 1)
            times = np.array([[seconds(run, device) for run in runs] for _ in range(count)])
            ours_ms, plain_ms = (float(ms) for ms in 1e3 * np.median(times, axis=0))
            shape = dict(zip(("B", "S", "I", "O", "rank"), size, strict=True))
            yield shape | {
                "tasks": num_tasks,
                "ours ms": ours_ms,
                "plain ms": plain_ms,
                "ours / plain": ours_ms / plain_ms,
            }
