"""A frozen linear in eight bits of floating point, which GPUs multiply by in eight bits too.

    w = q s                q in e4m3 (arXiv 2209.05433), s a power of two for each row of w
    y = (q_x s_x) (q s)^T  the input rounded likewise, with a scale for each token

A power of two changes no digit: a value is rounded by what it is, not by what else its row has, as
long as it is not 2^13 times smaller than the largest there. So a weight made again is exact in
bf16, whose scales are of whole rows, shards have the values of the whole; and where a row-parallel
shard's tokens have other scales than whole ones, their values are the same.

The gradient of the input is that by the weight, made again in the activations' dtype: multiplied in
eight bits it would be rounded itself, and would want the weight once more, transposed, which is all
the memory that eight bits spare.

Shape suffixes: I input and O output features, i and o those of this rank's shard, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lobra.model.checkpoint import CheckpointReader
from lobra.model.compiled import compiled
from lobra.model.scaled_rows import ScaledRows

E4M3 = torch.float8_e4m3fn
EXPONENT = 0x7F800000  # the bits of an fp32 number that are its power of two
LARGEST = 128.0  # power of two in what is rounded: of 256, e4m3, which ends at 448, has a half
SMALLEST = 1e-30  # that a row's largest value counts as: rows of zeros have a scale, too
GPU_MULTIPLE = 16  # of features, where a GPU multiplies


class Fp8Linear(ScaledRows):
    """A weight [o, i] in e4m3, with a scale for each of its rows."""

    is_fused = False  # whether one kernel rounds the input

    @property
    def in_features(self) -> int:
        """Return i."""
        return self.values_oi.shape[1]

    @staticmethod
    def stored(reader: CheckpointReader, name: str) -> tuple[Tensor, Tensor]:
        """Return a whole weight of a checkpoint that has it not quantised, rounded."""
        return rounded(reader.stored(f"{name}.weight").float())

    def weight_oi(self) -> Tensor:
        """Return the weight."""
        return self.values_oi.to(self.dtype).mul_(self.scales_o1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a new tensor, x W^T + b, [..., o] for [..., i]."""
        y = self.product(x)
        return y if self.bias is None else y.add_(self.bias)

    def product(self, x: Tensor) -> Tensor:
        """Return the same without the bias."""
        is_for_gpu = x.is_cuda and x.dtype == torch.bfloat16
        if is_for_gpu and not any(size % GPU_MULTIPLE for size in self.values_oi.shape):
            return self.scaled_product(x)
        values, scales = rounded(x)
        return functional.linear(values.to(x.dtype).mul_(scales), self.weight_oi())

    def scaled_product(self, x: Tensor) -> Tensor:
        """Return the product for x in bf16, [..., o], as a GPU computes it."""
        values_ni, scales_n1 = (rounded_at_once if self.is_fused else rounded)(x.flatten(0, -2))
        y = x.new_empty(*x.shape[:-1], len(self.values_oi))
        torch._scaled_mm(
            values_ni, self.values_oi.t(), scales_n1, self.scales_o1.t(), out_dtype=y.dtype,
            out=y.flatten(0, -2),
        )  # fmt: skip
        return y


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows rounded, e4m3 [..., i], and their scales, fp32 [..., 1]."""
    with torch._C.DisableTorchFunction():  # fp32 means fp32, in a proof in fp64 too
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).float()
        bits = largest.clamp_(min=SMALLEST).view(torch.int32)
        scales = bits.bitwise_and_(EXPONENT).view(torch.float32) / LARGEST
        return (x * scales.reciprocal().to(x.dtype)).to(E4M3), scales


def rounded_at_once(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same of rows [n, i] by one kernel, which is compiled for each i."""
    torch._dynamo.mark_static(x, 1)
    found: tuple[Tensor, Tensor] = compiled(rounded)(x)
    return found
