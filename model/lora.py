"""LoRA adapters of many tasks on one frozen linear layer.

Adapters are *canonical*: every rank stores A [r, in] and B [out, r] of its layers unsharded, in
fp32 (in fp64 beside an fp64 model), whatever its layout, and computes with the slice that matches
its shard. An adapter's gradient is then the plain sum over all ranks that hold the layer.

Shape suffixes: B rows, S positions, I input features, O output features, r LoRA rank; lower case
i, o: this rank's slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lobra.layout.shapes import module_path
from lobra.model.tensor_parallel import Group, reduce_from_group


@dataclass(frozen=True)
class AdapterSpec:
    """One task's adapter: what PEFT's LoraConfig says, reduced to what we support."""

    name: str
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    dropout: float = 0.0
    seed: int = 0

    @property
    def scaling(self) -> float:
        """Return alpha / rank, the factor of the low-rank update (LoRA, arXiv 2106.09685)."""
        return self.alpha / self.rank


@dataclass
class Adapter:
    """One task's A [r, I] and B [O, r] on one linear layer; `key` is unique to (task, layer)."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    dropout: float = 0.0
    key: int = 0


@dataclass(frozen=True)
class RowSegment:
    """Rows [start, stop) of a micro-batch belong to the task with index `task`."""

    task: int
    start: int
    stop: int


@dataclass
class RowTasks:
    """What the micro-batch now running is made of (one object a stage).

    `noise_seed` seeds LoRA dropout; None switches it off.
    """

    segments: tuple[RowSegment, ...] = ()
    noise_seed: int | None = None


def row_segments(row_tasks: Sequence[int]) -> tuple[RowSegment, ...]:
    """Return the runs of equal task in a micro-batch's rows (rows of a task are adjacent)."""
    segments: list[RowSegment] = []
    for row, task in enumerate(row_tasks):
        if segments and segments[-1].task == task:
            segments[-1] = RowSegment(task, segments[-1].start, row + 1)
        else:
            segments.append(RowSegment(int(task), row, row + 1))
    return tuple(segments)


def adapter_key(spec: AdapterSpec, layer: int, module: str) -> int:
    """Return a 63-bit number unique to the adapter's seed, task, layer and module."""
    digest = hashlib.sha256(f"{spec.seed}/{spec.name}/{layer}/{module}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def init_adapter(
    spec: AdapterSpec, layer: int, module: str, in_features: int, out_features: int
) -> tuple[Tensor, Tensor]:
    """Return A [r, I] and B [O, r] at their start: A uniform as PEFT does, B zero.

    PEFT initialises A with `kaiming_uniform_(a=sqrt(5))`, that is uniform within
    1/sqrt(in_features). The draw depends on (seed, task, layer, module) only, so every rank of
    every plan starts from the same adapter.
    """
    generator = torch.Generator().manual_seed(adapter_key(spec, layer, module))
    bound = 1.0 / math.sqrt(in_features)
    A_rI = torch.empty(spec.rank, in_features).uniform_(-bound, bound, generator=generator)
    return A_rI, torch.zeros(out_features, spec.rank)


@dataclass(frozen=True)
class Shard:
    """This rank's part of a linear layer: contiguous input and output features."""

    inputs: range
    outputs: range
    in_features: int
    out_features: int

    @property
    def is_row_parallel(self) -> bool:
        """Return whether the input features are split (the output is then summed)."""
        return len(self.inputs) < self.in_features


class MultiAdapterLinear(nn.Module):
    """A shard of a frozen linear layer plus the adapters of every task that targets it.

    Column-parallel (outputs split): y_o = x W_oI^T + s (x A^T) B_or^T.
    Row-parallel (inputs split): y = sum over ranks of x_i W_Oi^T + s (x_i A_ri^T) B^T, one
    reduction for base and adapters together, since both are linear.

    The adapters are held in a plain dict, not registered: the optimiser's modules own them.
    """

    def __init__(
        self,
        weight_oi: Tensor,
        bias_o: Tensor | None,
        shard: Shard,
        group: Group,
        row_tasks: RowTasks,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_oi, requires_grad=False)
        self.bias = None if bias_o is None else nn.Parameter(bias_o, requires_grad=False)
        self.shard = shard
        self.group = group
        self.row_tasks = row_tasks
        self.adapters: dict[int, Adapter] = {}

    def forward(self, x_BSi: Tensor) -> Tensor:
        """Return [B, S, o] (column-parallel) or the full [B, S, O] (row-parallel)."""
        reduced = self.shard.is_row_parallel
        y_BSo = functional.linear(x_BSi, self.weight, None if reduced else self.bias)
        y_BSo = self._add_adapters(x_BSi, y_BSo)
        if reduced:
            y_BSo = reduce_from_group(y_BSo, self.group)
            if self.bias is not None:
                y_BSo = y_BSo + self.bias
        return y_BSo

    def _add_adapters(self, x_BSi: Tensor, y_BSo: Tensor) -> Tensor:
        segments = self.row_tasks.segments
        adapters = [self.adapters.get(segment.task) for segment in segments]
        if not any(adapters):
            return y_BSo
        if len(segments) == 1:
            return y_BSo + self._update(self.adapters[segments[0].task], x_BSi)
        # One split, whose backward joins the parts' gradients: those of slices would be as many
        # zero-filled gradients of the whole input, added up.
        parts_BSi = x_BSi.split([segment.stop - segment.start for segment in segments])
        updates = [
            y_BSo.new_zeros(*part_BSi.shape[:-1], y_BSo.shape[-1])
            if adapter is None
            else self._update(adapter, part_BSi)
            for adapter, part_BSi in zip(adapters, parts_BSi, strict=True)
        ]
        return y_BSo + torch.cat(updates)

    def _update(self, adapter: Adapter, x_BSi: Tensor) -> Tensor:
        A_rI, B_Or = adapter.A.to(x_BSi.dtype), adapter.B.to(x_BSi.dtype)
        if adapter.dropout > 0.0 and self.row_tasks.noise_seed is not None:
            x_BSi = x_BSi * self._kept(adapter, x_BSi, self.row_tasks.noise_seed)
        if self.shard.is_row_parallel:
            A_rI = A_rI[:, self.shard.inputs.start : self.shard.inputs.stop]
        else:
            B_Or = B_Or[self.shard.outputs.start : self.shard.outputs.stop]
        return functional.linear(functional.linear(x_BSi, A_rI), B_Or * adapter.scaling)

    def _kept(self, adapter: Adapter, x_BSi: Tensor, noise_seed: int) -> Tensor:
        """Return the dropout factors of x: 0 or 1 / (1 - p), the same on the whole TP group.

        They are drawn for the unsharded input and cut to the shard, so that they depend on the
        micro-batch, the task and the layer, but not on the layout.
        """
        generator = torch.Generator(x_BSi.device)
        generator.manual_seed((noise_seed * 0x9E3779B1 + adapter.key) & 0x7FFFFFFFFFFFFFFF)
        full = (*x_BSi.shape[:-1], self.shard.in_features)
        drawn = torch.rand(full, generator=generator, device=x_BSi.device)
        drawn = drawn[..., self.shard.inputs.start : self.shard.inputs.stop]
        return (drawn >= adapter.dropout).to(x_BSi.dtype) / (1.0 - adapter.dropout)


@dataclass
class AdapterBank:
    """All adapters on one rank: `adapters[task][layer][module]`, canonical and trainable."""

    specs: tuple[AdapterSpec, ...]
    adapters: list[dict[int, dict[str, Adapter]]] = field(default_factory=list)

    def parameters(self, task: int, layers: range) -> list[nn.Parameter]:
        """Return the task's parameters in these layers, in a fixed order."""
        found = []
        for layer in layers:
            for module in sorted(self.adapters[task].get(layer, {})):
                adapter = self.adapters[task][layer][module]
                found += [adapter.A, adapter.B]
        return found

    def named_parameters(self, task: int) -> dict[str, nn.Parameter]:
        """Return the task's parameters on this rank under PEFT's names."""
        named: dict[str, nn.Parameter] = {}
        for layer, modules in self.adapters[task].items():
            for module, adapter in modules.items():
                name = peft_name(layer, module)
                named[f"{name}.lora_A.weight"] = adapter.A
                named[f"{name}.lora_B.weight"] = adapter.B
        return named

    def named_tensors(self, task: int) -> dict[str, Tensor]:
        """Return the task's adapter tensors on this rank under PEFT's names."""
        return {name: p.detach() for name, p in self.named_parameters(task).items()}

    @torch.no_grad()
    def load(self, task: int, tensors: dict[str, Any]) -> None:
        """Copy the task's tensors (PEFT's names) into this rank's layers; KeyError if missing."""
        for name, value in self.named_tensors(task).items():
            value_new = tensors[name]
            if tuple(value_new.shape) != tuple(value.shape):
                raise ValueError(
                    f"{name}: {tuple(value_new.shape)} instead of {tuple(value.shape)}"
                )
            value.copy_(value_new)


def peft_name(layer: int, module: str) -> str:
    """Return the name PEFT gives the adapter of a module (without `.lora_A.weight`)."""
    return f"base_model.model.model.layers.{layer}.{module_path(module)}"
