"""Whose the tokens of a micro-batch are, and what drops out of them.

Shape suffixes: N tokens, I input features, i those of this rank's shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lobra.model.adapter import AdapterSpec
from lobra.model.base_linear import Shard


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a flattened micro-batch are of the task with this number."""

    number: int
    start: int
    stop: int


def row_segments(row_tasks: Iterable[int], row_length: int) -> tuple[Segment, ...]:
    """Return the runs of equal task in a micro-batch of padded rows."""
    segments: list[Segment] = []
    for row, number in enumerate(row_tasks):
        start, stop = row * row_length, (row + 1) * row_length
        if segments and segments[-1].number == number:
            start = segments.pop().start
        segments.append(Segment(int(number), start, stop))
    return tuple(segments)


@dataclass(frozen=True)
class TokenTasks:
    """Whose the tokens of a micro-batch are; `noise_seed` seeds LoRA dropout (None: off).

    `apart` has each task computed by itself, whatever the stack. `shared` is what stacks work out
    of all this once for all layers.
    """

    segments: tuple[Segment, ...]
    noise_seed: int | None = None
    apart: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, init=False, compare=False)

    def drops(self, specs: Iterable[AdapterSpec]) -> bool:
        """Return whether something of these adapters' inputs drops out."""
        return self.noise_seed is not None and any(spec.dropout > 0.0 for spec in specs)


@dataclass
class Selection:
    """The micro-batch that is being computed (one object a stage)."""

    tasks: TokenTasks = TokenTasks(())


def keep_factors(
    dropout: float, seed: int, num_tokens: int, shard: Shard, dtype: torch.dtype,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Return what LoRA dropout multiplies an input by, [num_tokens, i]: 0 or 1 / (1 - dropout).

    They are drawn for the unsharded input, so that they do not depend on the layout.
    """
    generator = torch.Generator(device).manual_seed(seed)
    drawn_NI = torch.rand(num_tokens, shard.in_features, generator=generator, device=device)
    kept_Ni = drawn_NI[:, shard.inputs.start : shard.inputs.stop] >= dropout
    return kept_Ni.to(dtype) / (1.0 - dropout)
