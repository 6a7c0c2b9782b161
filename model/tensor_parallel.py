"""Tensor-parallel primitives: the two conjugate operators (Megatron-LM, arXiv 1909.08053, section
3), and a norm over the group.

Shape suffixes: f this rank's features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lobra.model.memory_policy import kept
from lobra.model.precision import kept_dtype

Group = dist.ProcessGroup | None


class _CopyToGroup(torch.autograd.Function):
    """Identity forward, sum over the group backward (Megatron's operator f)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFromGroup(torch.autograd.Function):
    """Sum over the group forward, identity backward (Megatron's operator g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, name: str) -> Tensor:
        def summed() -> Tensor:
            total = x.contiguous()
            dist.all_reduce(total, group=group)
            return total

        total = kept(name, summed)
        if total is x:
            ctx.mark_dirty(x)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Return x; its gradient is summed over the tensor-parallel group."""
    if group is None:
        return x
    copied: Tensor = _CopyToGroup.apply(x, group)
    return copied


def reduce_from_group(x: Tensor, group: Group, name: str) -> Tensor:
    """Return the sum of x over the tensor-parallel group (x itself is overwritten).

    ``name`` is that of the module x is of: memory policies go by it.
    """
    if group is None:
        return x
    reduced: Tensor = _ReduceFromGroup.apply(x, group, name)
    return reduced


class SharedNorm(nn.Module):
    """A root mean square norm of features that are split evenly over the group.

    Every rank has as many features, and where some are on several ranks, all are on as many: the
    mean over the ranks of their means is the mean of all.
    """

    def __init__(
        self, weight_f: Tensor, features: range, epsilon: float, group: Group, name: str
    ) -> None:
        """Norm those of all features that this rank has."""
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(weight_f, requires_grad=False)
        self.epsilon = epsilon
        self.group = group
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's features [..., f], normed, in the dtype of x."""
        wide = x.to(kept_dtype(x.dtype))
        share = wide.square().mean(dim=-1, keepdim=True) / dist.get_world_size(self.group)
        # Each rank's output depends on the mean, so its gradient is the sum of theirs.
        mean = copy_to_group(reduce_from_group(share, self.group, self.name), self.group)
        return (self.weight * (wide * torch.rsqrt(mean + self.epsilon))).to(x.dtype)
