"""A linear and a head whose weights are trained, this rank's shard of each.

Shape suffixes: N tokens, i input and o output features of the shard; T targets, D hidden, v this
rank's slice of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lobra.model.adapted_linear import AdaptedLinear
from lobra.model.head import LogitScale, VocabParallelHead, softmax_and_losses
from lobra.model.memory_policy import kept
from lobra.model.precision import kept_dtype
from lobra.model.tensor_parallel import Group, copy_to_group, reduce_from_group
from lobra.model.token_tasks import NOBODYS, TokenTasks


class _Product(torch.autograd.Function):
    """x W^T, which memory policies can keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x, weight_oi)
        return kept(name, lambda: functional.linear(x, weight_oi))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight_oi = ctx.saved_tensors
        dx = dy @ weight_oi if ctx.needs_input_grad[0] else None
        return dx, dy.flatten(0, -2).t() @ x.flatten(0, -2), None


class TrainedLinear(nn.Module):
    """A linear of a layer: row-parallel its output is summed before the bias is added."""

    def __init__(
        self, weight_oi: nn.Parameter, bias_o: nn.Parameter | None, group: Group, name: str
    ) -> None:
        """Be the linear called ``name``, the output summed over ``group``."""
        super().__init__()
        self.weight = weight_oi
        self.bias = bias_o
        self.group = group
        self.name = name

    @classmethod
    def of(cls, linear: AdaptedLinear) -> TrainedLinear:
        """Return the same linear without adapters; its weights are no copy."""
        base, name = linear.base, linear.stack.sites[linear.linear].module
        bias_o = base.bias if linear.bias is None else linear.bias
        return cls(base.weight, bias_o, linear.group, name)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., o] of x [..., i]."""
        y = reduce_from_group(_Product.apply(x, self.weight, self.name), self.group, self.name)
        return y if self.bias is None else y + self.bias


class TrainedHead(VocabParallelHead):
    """A head whose losses have gradients of its weight too."""

    @classmethod
    def of(cls, head: VocabParallelHead, weight_vD: nn.Parameter) -> TrainedHead:
        """Return the same head with this weight, which may be the embedding's."""
        trained = cls(weight_vD, head.rows, head.group, len(head.rows), head.scale)
        trained.weight = trained.base.weight = weight_vD
        trained.chunk = head.chunk
        return trained

    def losses(self, hidden_TD: Tensor, targets_T: Tensor, tasks: TokenTasks = NOBODYS) -> Tensor:
        """Return each token's cross-entropy [T], in fp32 (fp64 in fp64)."""
        hidden_TD = copy_to_group(hidden_TD, self.group)
        losses_T: Tensor = _TrainedCrossEntropy.apply(
            hidden_TD, self.weight, targets_T, self.rows.start, self.group, self.chunk, self.scale
        )
        return losses_T


class _TrainedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token; the backward pass computes the logits again, few at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        targets_T: Tensor,
        start: int,
        group: Group,
        chunk: int,
        scale: LogitScale,
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_vD, targets_T)
        ctx.rest = start, group, chunk, scale
        kept = kept_dtype(hidden_TD.dtype)
        losses_T = torch.empty(len(targets_T), dtype=kept, device=hidden_TD.device)
        for first in range(0, len(targets_T), chunk):
            part = slice(first, first + chunk)
            logits_Tv = functional.linear(hidden_TD[part], weight_vD).to(kept)
            scale.applied_(logits_Tv)
            losses_T[part] = softmax_and_losses(logits_Tv, targets_T[part], start, group)
        return losses_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden_TD, weight_vD, targets_T = ctx.saved_tensors
        start, group, chunk, scale = ctx.rest
        gradient_TD = torch.empty_like(hidden_TD)
        gradient_vD = torch.zeros_like(weight_vD, dtype=grad_T.dtype)
        for first in range(0, len(targets_T), chunk):
            part = slice(first, first + chunk)
            logits_Tv = functional.linear(hidden_TD[part], weight_vD).to(grad_T.dtype)
            slope_Tv = scale.applied_(logits_Tv)
            softmax_and_losses(logits_Tv, targets_T[part], start, group)
            logits_Tv.mul_(grad_T[part].unsqueeze(-1) / scale.divisor)
            if slope_Tv is not None:
                logits_Tv.mul_(slope_Tv)
            own_Tv = logits_Tv.to(weight_vD.dtype)
            torch.mm(own_Tv, weight_vD, out=gradient_TD[part])
            gradient_vD += own_Tv.t() @ hidden_TD[part]
        return gradient_TD, gradient_vD.to(weight_vD.dtype), *[None] * 5
