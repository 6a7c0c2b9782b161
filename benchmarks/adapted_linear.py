"""The linears of one input with the adapters of several tasks: both stacks against plain torch.

Forward and backward of two frozen linears that share an input (such as gate and up), on a
micro-batch whose rows are of 1, 4 or 12 tasks, each with an adapter. "Plain" slices each task's
rows, adds the low-rank update and joins the parts, and leaves the rest to autograd. All are run in
turn; the rows are medians and their ratios. Rows of four tokens show what a call costs by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from lobra.layout.shapes import ModelShape
from lobra.model.adapter import AdapterSpec, Site
from lobra.model.base_linear import DenseLinear
from lobra.model.joint_stack import JointStack
from lobra.model.segment_stack import SegmentStack
from lobra.model.sharded_layer import linear_shards
from lobra.model.slot import Slot
from lobra.model.stack import AdaptedLinear
from lobra.model.token_tasks import Segment, Selection, TokenTasks

MODULES = ("gate_proj", "up_proj")
SIZES = ((12, 4, 16, 16, 4), (24, 128, 512, 512, 16), (24, 128, 512, 1376, 16))  # B, S, I, O, rank


def make(size: tuple[int, ...], num_tasks: int, device: torch.device) -> list[Callable[[], None]]:
    """Return a forward and backward pass of the segment stack, of the joint stack, and of plain."""
    num_rows, length, inputs, outputs, rank = size
    shape = ModelShape("one", 1, inputs, outputs, 1, 1, inputs, 1)
    tokens = num_rows * length // num_tasks
    segments = tuple(Segment(task, task * tokens, (task + 1) * tokens) for task in range(num_tasks))
    specs = [AdapterSpec(str(task), rank, rank, MODULES) for task in range(num_tasks)]
    slots = {
        task: Slot(task, spec, shape, range(1), torch.float32, device)
        for task, spec in enumerate(specs)
    }
    weights = [torch.randn(outputs, inputs, device=device) for _ in MODULES]
    x_BSi = torch.randn(num_rows, length, inputs, device=device, requires_grad=True)
    dy_BSo = torch.randn(num_rows, length, outputs, device=device)

    def stacked(way: type[SegmentStack | JointStack]) -> Callable[[], None]:
        shards = [linear_shards(shape, 1, 0)[module] for module in MODULES]
        stack = way(
            [Site(0, module, inputs, outputs) for module in MODULES], shards,
            [DenseLinear(weight, None) for weight in weights],
            Selection(TokenTasks(segments)), torch.float32, device,
        )  # fmt: skip
        stack.arrange(slots)
        linears = [AdaptedLinear(stack, linear) for linear in range(len(MODULES))]

        def run() -> None:
            torch.autograd.backward([linear(x_BSi) for linear in linears], [dy_BSo] * 2)

        return run

    factors = {
        task: [
            slot.layout.rows(slot.weights.clone(), tensor).detach().requires_grad_(True)
            for tensor in slot.layout.tensors
        ]
        for task, slot in slots.items()
    }

    def plain() -> None:
        x_Ni, ys = x_BSi.flatten(0, 1), []
        for linear, weight in enumerate(weights):
            y_No, parts = functional.linear(x_Ni, weight), []
            for segment in segments:
                rows = slice(segment.start, segment.stop)
                A_ri, B_ro = (factors[segment.number][place] for place in (linear, 2 + linear))
                parts.append(y_No[rows] + x_Ni[rows] @ A_ri.t() @ B_ro)
            ys.append(torch.cat(parts).view_as(dy_BSo))
        torch.autograd.backward(ys, [dy_BSo] * 2)

    return [stacked(SegmentStack), stacked(JointStack), plain]


def seconds(run: Callable[[], None], device: torch.device) -> float:
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
    for size in SIZES:
        for num_tasks in (1, 4, 12):
            runs = make(size, num_tasks, torch.device(device))
            count = repeats * (10 if size[1] < 16 else 1)
            times = [[seconds(run, torch.device(device)) for run in runs] for _ in range(count)]
            segments_ms, joint_ms, plain_ms = (1e3 * np.median(times, axis=0)).tolist()
            shape = dict(zip(("B", "S", "I", "O", "rank"), size, strict=True))
            yield shape | {
                "tasks": num_tasks,
                "segments ms": segments_ms,
                "joint ms": joint_ms,
                "plain ms": plain_ms,
                "segments / plain": segments_ms / plain_ms,
                "joint / plain": joint_ms / plain_ms,
            }
