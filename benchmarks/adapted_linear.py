"""The linears of one input with the adapters of several tasks, by every way to compute them.

Forward and backward of two frozen linears that share an input (such as gate and up), on a
micro-batch whose rows are of several tasks, each with an adapter. Ways:

    base      the frozen linears alone
    segments  task by task, the way on a CPU
    joint     all tasks at once, at most 256 ranks, the way on a GPU
    whole     the same, however many ranks they have
    grouped   torch's grouped products, the rest left to autograd
    plain     each task's rows sliced, updated and joined, the rest left to autograd

All are run in turn; rows are medians in ms. Rows of four tokens show what a call costs by itself.
On a GPU the sizes are those of an 8B model, in bf16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lobra.layout.shapes import ModelShape
from lobra.model.adapted_linear import AdaptedLinear
from lobra.model.adapter import AdapterSpec
from lobra.model.base_linear import DenseLinear
from lobra.model.joint_stack import JointStack
from lobra.model.segment_stack import SegmentStack
from lobra.model.sharded_layer import linear_shards
from lobra.model.site import Site
from lobra.model.slot import Slot
from lobra.model.stack import Stack
from lobra.model.token_tasks import Segment, Selection, TokenTasks

MODULES = ("gate_proj", "up_proj")
# B, S, I, O, rank
SIZES = {
    "cpu": ((12, 4, 16, 16, 4), (24, 128, 512, 512, 16), (24, 128, 512, 1376, 16)),
    "cuda": ((64, 128, 4096, 14336, 16),),
}
TASKS = {"cpu": (1, 4, 12), "cuda": (1, 4, 16, 32, 64)}

Run = Callable[[], None]


class WholeStack(JointStack):
    """Computes any number of ranks at once."""

    most_ranks = 1 << 30


STACKS: dict[str, Callable[..., Stack]] = {
    "segments": SegmentStack,
    "joint": JointStack,
    "whole": WholeStack,
}


def make(size: tuple[int, ...], num_tasks: int, device: torch.device) -> dict[str, Run]:
    """Return a forward and backward pass by every way."""
    num_rows, length, inputs, outputs, rank = size
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = ModelShape("one", 1, inputs, outputs, 1, 1, inputs, 1)
    tokens = num_rows * length // num_tasks
    segments = tuple(Segment(task, task * tokens, (task + 1) * tokens) for task in range(num_tasks))
    specs = [AdapterSpec(str(task), rank, rank, MODULES) for task in range(num_tasks)]
    slots = {
        task: Slot(task, spec, shape, range(1), torch.float32, device)
        for task, spec in enumerate(specs)
    }
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    weights = [torch.randn(outputs, inputs, **like) for _ in MODULES]
    x_BSi = torch.randn(num_rows, length, inputs, **like, requires_grad=True)
    dy_BSo = torch.randn(num_rows, length, outputs, **like)
    ends = torch.tensor([segment.stop for segment in segments], dtype=torch.int32, device=device)
    # Of each linear [tasks, r, i] and [tasks, r, o]: rows A of both linears, then B of both.
    A, B = (
        [
            torch.stack([slot.layout.rows(slot.weights, tensors[place]) for slot in slots.values()])
            .to(dtype)
            .requires_grad_()
            for place in places
        ]
        for tensors in [slots[0].layout.tensors]
        for places in ((0, 1), (2, 3))
    )

    def stacked(way: Callable[..., Stack]) -> Run:
        shards = [linear_shards(shape, 1, 0)[module] for module in MODULES]
        stack = way(
            [Site(0, module, inputs, outputs) for module in MODULES], shards,
            [DenseLinear(weight, None) for weight in weights],
            Selection(TokenTasks(segments)), dtype, device,
        )  # fmt: skip
        stack.arrange(slots)
        return passes(lambda linear: AdaptedLinear(stack, linear)(x_BSi))

    def passes(output: Callable[[int], Tensor]) -> Run:
        return lambda: torch.autograd.backward(
            [output(linear).view_as(dy_BSo) for linear in range(len(MODULES))],
            [dy_BSo] * len(MODULES),
        )

    def base(linear: int) -> Tensor:
        return functional.linear(x_BSi, weights[linear])

    def grouped(linear: int) -> Tensor:
        h_Nr = functional.grouped_mm(x_BSi.flatten(0, 1), A[linear].transpose(1, 2), offs=ends)
        return base(linear).flatten(0, 1) + functional.grouped_mm(h_Nr, B[linear], offs=ends)

    def plain(linear: int) -> Tensor:
        x_Ni, y_No, parts = x_BSi.flatten(0, 1), base(linear).flatten(0, 1), []
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            update = x_Ni[rows] @ A[linear][segment.number].t() @ B[linear][segment.number]
            parts.append(y_No[rows] + update)
        return torch.cat(parts)

    return {
        "base": passes(base),
        **{name: stacked(way) for name, way in STACKS.items()},
        "grouped": passes(grouped),
        "plain": passes(plain),
    }


def seconds(run: Run, device: torch.device) -> float:
    """Return what one run takes."""
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def adapted_linear(
    *, device: Literal["cpu", "cuda"] = "cpu", repeats: int = 100
) -> Iterator[dict[str, Any]]:
    """Time two linears that share an input with the adapters of several tasks.

    Parameters
    ----------
    device
        Where the layers are.
    repeats
        Of forward and backward; ten times as many of the smallest size.
    """
    for size in SIZES[device]:
        for num_tasks in TASKS[device]:
            runs = make(size, num_tasks, torch.device(device))
            count = repeats * (10 if size[1] < 16 else 1)
            times = [
                [seconds(run, torch.device(device)) for run in runs.values()] for _ in range(count)
            ]
            medians_ms = (1e3 * np.median(times, axis=0)).tolist()
            shape = dict(zip(("B", "S", "I", "O", "rank"), size, strict=True))
            yield shape | {"tasks": num_tasks} | dict(zip(runs, medians_ms, strict=True))
