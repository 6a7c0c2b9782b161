"""One linear layer with the adapters of several tasks: ours against its formula in plain torch.

    python benchmarks/adapted_linear.py [--device cpu] [--repeats 200]

Forward and backward of a frozen layer on a micro-batch whose rows are of 1, 4 or 12 tasks, each
with an adapter. "Plain" slices the rows of each task, adds the low-rank update and joins the parts,
and leaves the rest to autograd. Both are run in turn; printed are medians and their ratio. Twelve
rows of four tokens show what a call costs by itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def main() -> None:
    """Measure and print a row for each size and number of tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    print("  B    S    I     O  rank  tasks      ours     plain   ours / plain")
    for size in SIZES:
        for num_tasks in (1, 4, 12):
            linear, x_BSi, dy_BSo = make(size, num_tasks, args.device)
            runs = [
                lambda f=function, x=x_BSi, dy=dy_BSo: f(x).backward(dy)
                for function in (linear, partial(plain, linear))
            ]
            repeats = args.repeats * (10 if size[1] < 16 else 1)
            times = np.array([[seconds(run, args.device) for run in runs] for _ in range(repeats)])
            mine, other = 1e3 * np.median(times, axis=0)
            shape = " ".join(f"{n:4}" for n in size)
            print(f"{shape}  {num_tasks:5} {mine:7.3f} ms {other:7.3f} ms {mine / other:10.2f}")


if __name__ == "__main__":
    main()
