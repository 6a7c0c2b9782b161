"""Frozen linears kept in eight or four bits: their weights are made again whenever one is needed.

    int8    w = q s / 127    q integers, s the largest magnitude of w's row (arXiv 2208.07339)
    nf4     w = v(q) s       v(q) one of 16 values, s the largest magnitude in a block of 64 values
                             that follow each other in the row (arXiv 2305.14314)

With nf4 the scales s are in 8 bits themselves, 256 together with one scale in fp32. The formats are
bitsandbytes', in which quantised models are published. It makes nf4 with kernels for CPUs and GPUs;
int8 is made here, as its kernel for GPUs knows fp16 only.

A whole weight is quantised and then cut, so that shards of all layouts have the same values. Blocks
that a shard has a part of are kept whole.

Shape suffixes: I input and O output features, i and o those of this rank's shard, W blocks in a row
of the whole weight, w of this shard, r rows of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lobra.layout.base_precision import (
    FP8,
    INT8,
    NF4,
    NF4_BLOCK,
    SCALE_BLOCK,
    quieten_library,
)
from lobra.layout.shapes import FusedLinear
from lobra.model.base_linear import BaseLinear, DenseLinear, Shard, row_numbers
from lobra.model.checkpoint import CheckpointReader
from lobra.model.fp8_linear import Fp8Linear
from lobra.model.quantised_checkpoint import NF4_STATE, ROW_SCALES, Nf4State
from lobra.model.scaled_rows import ScaledRows

QUANTISED_AT_ONCE = 1 << 20  # elements: on a CPU the library takes 100 bytes for each
MADE_AT_ONCE = 1 << 18
SMALLEST = 1e-30  # of a scale: rows of zeros have one, too


class Int8Linear(ScaledRows):
    """A weight [o, i] in eight bits, with a scale for each of its rows."""

    @staticmethod
    def stored(reader: CheckpointReader, name: str) -> tuple[Tensor, Tensor]:
        """Return a whole weight of a checkpoint that has it in int8 or not quantised."""
        values_OI = reader.stored(f"{name}.weight")
        if reader.is_quantised:
            scales_O = reader.stored(f"{name}.{ROW_SCALES}")
        else:
            values_OI, scales_O = int8(values_OI)
        return values_OI, scales_O[:, None] / 127

    def weight_oi(self) -> Tensor:
        """Return the weight."""
        weight_oi = torch.empty_like(self.values_oi, dtype=self.dtype)
        # In fp32, in a proof in fp64 too: one kernel on a GPU, pieces for the caches on a CPU.
        at_once = weight_oi.numel() if weight_oi.is_cuda else MADE_AT_ONCE
        num_rows = max(1, at_once // weight_oi.shape[1])
        rows = (part.split(num_rows) for part in (weight_oi, self.values_oi, self.scales_o1))
        for made, values, scales in zip(*rows, strict=True):
            torch.mul(values, scales, out=made)
        return weight_oi


def int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight's values, int8 [O, I], and the scales of its rows, fp32 [O]."""
    values, scales = [], []
    for part in weight_OI.split(max(1, QUANTISED_AT_ONCE // weight_OI.shape[1])):
        part = part.float()
        scales.append(part.abs().amax(1).clamp(min=SMALLEST))
        values.append((part * (127 / scales[-1][:, None])).round().to(torch.int8))
    return torch.cat(values), torch.cat(scales)


@dataclass(frozen=True)
class Nf4Weight:
    """A whole weight in nf4.

    Attributes
    ----------
    packed
        Two values a byte, uint8 [I O / 2].
    scales
        Of blocks: fp32 [I O / 64], or uint8, numbers of values in ``code`` [256].
    outer_scales
        What those of ``code`` are multiplied by, fp32 [I O / 64 / 256].
    offset
        What is then added, fp32 [].
    """

    packed: Tensor
    scales: Tensor
    code: Tensor | None = None
    outer_scales: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def read(cls, reader: CheckpointReader, name: str) -> Nf4Weight:
        """Return a linear's weight in a checkpoint that has it in nf4 or not quantised."""
        stored = reader.stored(f"{name}.weight")
        if not reader.is_quantised:
            return cls.of(stored)
        state = Nf4State.of_tensor(reader.stored(f"{name}.{NF4_STATE}"), f"{reader.folder}: {name}")
        packed, scales = stored.flatten(), reader.stored(f"{name}.weight.absmax")
        if state.nested_offset is None:
            return cls(packed, scales)
        code, outer_scales = (
            reader.stored(f"{name}.weight.{part}") for part in ("nested_quant_map", "nested_absmax")
        )
        return cls(packed, scales, code, outer_scales, code.new_tensor(state.nested_offset))

    @classmethod
    def of(cls, weight_OI: Tensor) -> Nf4Weight:
        """Return a weight quantised, its blocks' scales too."""
        library = bitsandbytes()
        packed, all_scales = [], []
        num_rows = NF4_BLOCK * max(1, QUANTISED_AT_ONCE // (NF4_BLOCK * weight_OI.shape[1]))
        for part in weight_OI.split(num_rows):
            values, state = library.quantize_4bit(
                part.float(), blocksize=NF4_BLOCK, quant_type="nf4"
            )
            packed.append(values.flatten())
            all_scales.append(state.absmax)
        scales = torch.cat(all_scales)
        offset = scales.mean()
        numbers, outer = library.quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK)
        return cls(torch.cat(packed), numbers, outer.code.to(offset.device), outer.absmax, offset)


class Nf4Linear(BaseLinear):
    """A weight [o, i] in four bits: rows of blocks of it that a shard has values of."""

    packed: Tensor
    scales_rw: Tensor
    rows_r: Tensor
    code: Tensor | None
    outer_scales: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        weight: Nf4Weight,
        shard: Shard,
        rows: Tensor,
        dtype: torch.dtype,
        bias_o: Tensor | None = None,
    ) -> None:
        """Cut the shard, which has these rows, out of a whole weight; have activations of dtype."""
        super().__init__(bias_o)
        self.dtype = dtype
        self.shape = len(shard.outputs), len(shard.inputs)
        if shard.in_features % NF4_BLOCK:  # blocks reach over rows: all are here, as one
            rows, blocks, self.columns = rows[:1], range(len(weight.scales)), slice(None)
            self.row_blocks = len(blocks)
        else:
            first, stop = shard.inputs.start, shard.inputs.stop
            blocks = range(first // NF4_BLOCK, -(-stop // NF4_BLOCK))
            before = blocks.start * NF4_BLOCK
            self.columns = slice(first - before, stop - before)
            self.row_blocks = shard.in_features // NF4_BLOCK
        own = slice(blocks.start, blocks.stop)
        self.first_block = blocks.start
        packed = weight.packed.view(-1, self.row_blocks, NF4_BLOCK // 2)
        self.register_buffer("packed", packed[rows, own].reshape(-1, 1))
        self.register_buffer("scales_rw", weight.scales.view(-1, self.row_blocks)[rows, own])
        self.register_buffer("rows_r", rows)
        self.register_buffer("code", weight.code)
        self.register_buffer("outer_scales", weight.outer_scales)
        self.register_buffer("offset", weight.offset)

    @classmethod
    def read(
        cls,
        reader: CheckpointReader,
        name: str,
        shard: Shard,
        fused: FusedLinear | None = None,
        bias_o: Tensor | None = None,
    ) -> Nf4Linear:
        """Read the shard of a linear, from a checkpoint that has it in nf4 or not quantised."""
        rows = row_numbers(shard.stored_rows(fused), fused).to(reader.device)
        return cls(Nf4Weight.read(reader, name), shard, rows, reader.dtype, bias_o)

    def weight_oi(self) -> Tensor:
        """Return the weight."""
        library = bitsandbytes()
        # Its kernels make no fp64: there the values are those of fp32.
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        with torch._C.DisableTorchFunction():  # fp32 means fp32, in a proof in fp64 too
            scales_rw = self._scales_rw()
            state = library.QuantState(
                absmax=scales_rw.flatten(),
                # Not the weight's own: on a CPU it errs where blocks reach over rows.
                shape=torch.Size((scales_rw.numel(), NF4_BLOCK)),
                dtype=dtype,
                blocksize=NF4_BLOCK,
                quant_type="nf4",
            )
            blocks = library.dequantize_4bit(self.packed, state).to(self.dtype)
        return blocks.view(len(scales_rw), -1)[:, self.columns].view(self.shape)

    def _scales_rw(self) -> Tensor:
        if self.code is None or self.outer_scales is None or self.offset is None:
            return self.scales_rw
        numbers = torch.arange(self.scales_rw.shape[1], device=self.scales_rw.device)
        blocks_rw = self.rows_r[:, None] * self.row_blocks + self.first_block + numbers
        outer_rw = self.outer_scales[blocks_rw // SCALE_BLOCK]
        return self.code[self.scales_rw.int()] * outer_rw + self.offset


KINDS: Mapping[str, type[Fp8Linear | Int8Linear | Nf4Linear]] = {
    FP8: Fp8Linear,
    INT8: Int8Linear,
    NF4: Nf4Linear,
}


@cache
def bitsandbytes() -> Any:
    """Return the library's functions; as it is an extra, it is imported where one is needed."""
    quieten_library()
    from bitsandbytes import functional

    return functional


def read_linear(
    reader: CheckpointReader,
    name: str,
    shard: Shard,
    quantised: str | None,
    fused: FusedLinear | None = None,
    bias_o: Tensor | None = None,
) -> BaseLinear:
    """Return the shard of the linear called ``name`` in the checkpoint, quantised or dense.

    Of a checkpoint that is quantised, linears that are not stay as they are.
    """
    own = (f"{name}.{ROW_SCALES}", f"{name}.{NF4_STATE}")
    if quantised is None or (reader.is_quantised and not any(part in reader for part in own)):
        return DenseLinear.read(reader, name, shard, fused, bias_o)
    return KINDS[quantised].read(reader, name, shard, fused, bias_o)
