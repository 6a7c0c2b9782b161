"""Tensor-parallel primitives: the two conjugate operators, vocabulary-parallel embedding, head
and cross-entropy (Megatron-LM, arXiv 1909.08053, section 3).

Shape suffixes: B batch rows, S sequence positions, T selected tokens, D hidden, V vocabulary,
v this rank's slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from lobra.model.memory_policy import kept
from lobra.model.precision import kept_dtype

Group = dist.ProcessGroup | None

# Elements of a chunk of logits (128 MiB in fp32): large enough to keep a GPU busy.
LOGITS_AT_ONCE = 1 << 25


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

    def __init__(self, weight_f: Tensor, epsilon: float, group: Group, name: str) -> None:
        super().__init__()
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


class VocabParallelEmbedding(nn.Module):
    """Rows [start, stop) of the token embedding; the sum over the group is the embedding.

    `weight` [v, D] is frozen; Gemma multiplies what comes out by `scale`, in the weight's dtype.
    """

    def __init__(
        self, weight_vD: Tensor, rows: range, group: Group, scale: float | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_vD, requires_grad=False)
        self.rows = rows
        self.group = group
        self.scale = None if scale is None else float(torch.tensor(scale, dtype=weight_vD.dtype))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return the embeddings [B, S, D]."""
        embedded_BSD = self._embed(tokens_BS)
        return embedded_BSD if self.scale is None else embedded_BSD * self.scale

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        if self.group is None:
            return functional.embedding(tokens_BS, self.weight)
        local_BS = tokens_BS - self.rows.start
        outside_BS = (local_BS < 0) | (local_BS >= len(self.rows))
        embedded_BSD = functional.embedding(local_BS.masked_fill(outside_BS, 0), self.weight)
        embedded_BSD = embedded_BSD.masked_fill(outside_BS.unsqueeze(-1), 0.0)
        return reduce_from_group(embedded_BSD, self.group, "embed_tokens")


@dataclass(frozen=True)
class LogitScale:
    """What becomes of the head's product: divided (Granite), then kept below a cap (Gemma 2)."""

    divisor: float = 1.0
    cap: float | None = None

    def applied_(self, logits_Tv: Tensor) -> Tensor | None:
        """Scale logits in place; return the slope [T, v] that the cap has there."""
        if self.divisor != 1.0:
            logits_Tv.div_(self.divisor)
        if self.cap is None:
            return None
        logits_Tv.div_(self.cap).tanh_()
        slope_Tv = 1 - logits_Tv.square()
        logits_Tv.mul_(self.cap)
        return slope_Tv


PLAIN_LOGITS = LogitScale()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token, the vocabulary split over a group, a few tokens at a time.

    The head is frozen, so the gradient of a token's loss with respect to its hidden state,
    (softmax - one hot) W, is known as soon as the loss is. It is computed in the forward pass and
    the logits are forgotten: what is alive at once is `chunk` rows of logits, whatever the
    micro-batch holds. The backward pass multiplies it by what the loss counts for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        targets_T: Tensor,
        start: int,
        group: Group,
        chunk: int,
        with_gradient: bool,
        scale: LogitScale,
    ) -> Tensor:
        kept = kept_dtype(hidden_TD.dtype)
        losses_T = torch.empty(len(targets_T), dtype=kept, device=hidden_TD.device)
        ctx.gradient_TD = torch.empty_like(hidden_TD) if with_gradient else None
        for first in range(0, len(targets_T), chunk):
            part = slice(first, first + chunk)
            logits_Tv = functional.linear(hidden_TD[part], weight_vD).to(kept)
            slope_Tv = scale.applied_(logits_Tv)
            losses_T[part] = softmax_and_losses(logits_Tv, targets_T[part], start, group)
            if ctx.gradient_TD is not None:
                if scale.divisor != 1.0:
                    logits_Tv.div_(scale.divisor)
                if slope_Tv is not None:
                    logits_Tv.mul_(slope_Tv)
                torch.mm(logits_Tv.to(weight_vD.dtype), weight_vD, out=ctx.gradient_TD[part])
            del logits_Tv, slope_Tv  # before the next chunk's are made
        return losses_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient_TD, ctx.gradient_TD = ctx.gradient_TD, None
        return gradient_TD.mul_(grad_T.unsqueeze(-1)), *[None] * 7


def softmax_and_losses(logits_Tv: Tensor, targets_T: Tensor, start: int, group: Group) -> Tensor:
    """Return the losses [T]; turn the logits, in place, into softmax minus one hot."""
    maximum_T = logits_Tv.amax(dim=-1)
    if group is not None:
        dist.all_reduce(maximum_T, op=dist.ReduceOp.MAX, group=group)
    logits_Tv -= maximum_T.unsqueeze(-1)
    local_T = targets_T - start
    outside_T = (local_T < 0) | (local_T >= logits_Tv.shape[-1])
    local_T1 = local_T.masked_fill(outside_T, 0).unsqueeze(-1)
    target_T = logits_Tv.gather(-1, local_T1).squeeze(-1).masked_fill(outside_T, 0.0)
    exponent_Tv = logits_Tv.exp_()
    sums_2T = torch.stack([exponent_Tv.sum(dim=-1), target_T])
    if group is not None:
        dist.all_reduce(sums_2T, group=group)
    total_T, target_T = sums_2T
    hit_T1 = outside_T.to(exponent_Tv.dtype).sub_(1.0).unsqueeze(-1)  # 0 outside, else -1
    exponent_Tv.div_(total_T.unsqueeze(-1)).scatter_add_(-1, local_T1, hit_T1)
    return total_T.log() - target_T


class VocabParallelHead(nn.Module):
    """The output projection over this rank's slice of the vocabulary, with the loss.

    `weight` [v, D] is frozen. `largest_slice` is the most rows any rank of the group has. From it
    follows `chunk`, how many tokens' logits the loss holds at once: slices may differ by one row,
    but the ranks must agree on the chunks, since each chunk is two all-reduces.
    """

    def __init__(
        self, weight_vD: Tensor, rows: range, group: Group, largest_slice: int,
        scale: LogitScale = PLAIN_LOGITS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(weight_vD, requires_grad=False)
        self.rows = rows
        self.group = group
        self.scale = scale
        self.chunk = max(1, LOGITS_AT_ONCE // max(1, largest_slice))

    def losses(self, hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        """Return each token's cross-entropy [T], in fp32 (fp64 in fp64).

        They are the same on the whole group, and can be differentiated once.
        """
        hidden_TD = copy_to_group(hidden_TD, self.group)
        with_gradient = torch.is_grad_enabled() and hidden_TD.requires_grad
        losses_T: Tensor = _VocabParallelCrossEntropy.apply(
            hidden_TD,
            self.weight,
            targets_T,
            self.rows.start,
            self.group,
            self.chunk,
            with_gradient,
            self.scale,
        )
        return losses_T

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Return this rank's slice of the logits [T, v]."""
        logits_Tv = functional.linear(copy_to_group(hidden_TD, self.group), self.weight)
        self.scale.applied_(logits_Tv)
        return logits_Tv
