"""The head: logits over this rank's slice of the vocabulary, and the losses of targets.

The vocabulary is split over a tensor-parallel group (Megatron-LM, arXiv 1909.08053, section 3).

Shape suffixes: T selected tokens, D hidden, v this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lobra.model.base_linear import DenseLinear, Shard
from lobra.model.part import Part
from lobra.model.precision import kept_dtype
from lobra.model.segment_stack import SegmentStack
from lobra.model.site import Site
from lobra.model.tensor_parallel import Group, copy_to_group
from lobra.model.token_tasks import NOBODYS, Selection, TokenTasks

# Elements of a chunk of logits (128 MiB in fp32): large enough to keep a GPU busy.
LOGITS_AT_ONCE = 1 << 25


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


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token, the vocabulary split over a group, a few tokens at a time.

    The base is frozen, so where no task has an adapter on the head the gradient of a token's loss
    with respect to its hidden state, (softmax - one hot) W, is known as soon as the loss is. It is
    computed in the forward pass and the logits are forgotten: what is alive at once is a chunk of
    logits, whatever the micro-batch holds. The backward pass multiplies it by what the loss counts
    for. An adapter's gradient is a sum over tokens of what depends on that: chunks with tokens of
    an adapter are computed again in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        _anchor: Tensor | None,
        head: VocabParallelHead,
        targets_T: Tensor,
        parts: Sequence[Sequence[Part]],
        with_gradient: bool,
    ) -> Tensor:
        losses_T = hidden_TD.new_empty(len(targets_T), dtype=kept_dtype(hidden_TD.dtype))
        ctx.gradient_TD = torch.empty_like(hidden_TD) if with_gradient else None
        for tokens, own in zip(head.chunks(len(targets_T)), parts, strict=True):
            losses_T[tokens], dlogits_Tv, _ = head.computed(
                hidden_TD[tokens], targets_T[tokens], own
            )
            if with_gradient and not own:
                slopes = dlogits_Tv.to(hidden_TD.dtype)
                ctx.gradient_TD[tokens] = head.base.input_gradient(slopes, None)
                del slopes
            del dlogits_Tv  # before the next chunk's are made
        ctx.head, ctx.parts = head, parts
        if with_gradient and any(parts):
            ctx.save_for_backward(hidden_TD, targets_T)
        return losses_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        head: VocabParallelHead = ctx.head
        gradient_TD, ctx.gradient_TD = ctx.gradient_TD, None
        for tokens, own in zip(head.chunks(len(grad_T)), ctx.parts, strict=True):
            if own:
                hidden_TD, targets_T = ctx.saved_tensors
                gradient_TD[tokens] = head.input_gradient(
                    hidden_TD[tokens], targets_T[tokens], own, grad_T[tokens]
                )
            else:
                gradient_TD[tokens] *= grad_T[tokens].unsqueeze(-1)
        return gradient_TD, *[None] * 5


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

    `base` has the weight [v, D], which is frozen; `stack` the tasks' adapters on it, if it may have
    any. `largest_slice` is the most rows any rank of the group has. From it follows `chunk`, how
    many tokens' logits the loss holds at once: slices may differ by one row, but the ranks must
    agree on the chunks, since each chunk is two all-reduces.
    """

    def __init__(
        self, weight_vD: Tensor, rows: range, group: Group, largest_slice: int,
        scale: LogitScale = PLAIN_LOGITS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.base = DenseLinear(weight_vD, None)
        self.stack: SegmentStack | None = None
        self.rows = rows
        self.group = group
        self.scale = scale
        self.chunk = max(1, LOGITS_AT_ONCE // max(1, largest_slice))

    def adapted(self, site: Site, selection: Selection) -> SegmentStack:
        """Return the stack of the adapters that tasks have on it from now on.

        They are computed task by task: in a chunk of logits, few have tokens.
        """
        shard = Shard(range(site.in_features), self.rows, site.in_features, site.out_features)
        weight = self.base.weight
        self.stack = SegmentStack(
            [site], [shard], [self.base], selection, weight.dtype, weight.device
        )
        return self.stack

    def chunks(self, num_tokens: int) -> list[slice]:
        """Return the tokens whose logits are held at once."""
        return [slice(start, start + self.chunk) for start in range(0, num_tokens, self.chunk)]

    def losses(self, hidden_TD: Tensor, targets_T: Tensor, tasks: TokenTasks = NOBODYS) -> Tensor:
        """Return each token's cross-entropy [T], in fp32 (fp64 in fp64).

        They are the same on the whole group, and can be differentiated once. ``tasks`` says whose
        the tokens are.
        """
        hidden_TD = copy_to_group(hidden_TD, self.group)
        parts = [self._parts(tasks.part(tokens)) for tokens in self.chunks(len(targets_T))]
        anchor = self.stack.anchor if self.stack is not None and any(parts) else None
        needs_gradient = hidden_TD.requires_grad or anchor is not None
        with_gradient = torch.is_grad_enabled() and needs_gradient
        losses_T: Tensor = _CrossEntropy.apply(
            hidden_TD, anchor, self, targets_T, parts, with_gradient
        )
        return losses_T

    def computed(
        self, hidden_TD: Tensor, targets_T: Tensor, parts: Sequence[Part]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return losses [T], their gradients by the products [T, v], and each part's `hidden`."""
        products_Tv, hidden = self._products(hidden_TD, parts)
        logits_Tv = products_Tv.to(kept_dtype(hidden_TD.dtype))
        del products_Tv
        slope_Tv = self.scale.applied_(logits_Tv)
        losses_T = softmax_and_losses(logits_Tv, targets_T, self.rows.start, self.group)
        if self.scale.divisor != 1.0:
            logits_Tv.div_(self.scale.divisor)
        if slope_Tv is not None:
            logits_Tv.mul_(slope_Tv)
        return losses_T, logits_Tv, hidden

    def input_gradient(
        self, hidden_TD: Tensor, targets_T: Tensor, parts: Sequence[Part], grad_T: Tensor
    ) -> Tensor:
        """Return the gradient [T, D] of tokens by that of their losses.

        Those of the adapters are added into the slots.
        """
        assert self.stack is not None
        _, dlogits_Tv, hidden = self.computed(hidden_TD, targets_T, parts)
        dlogits_Tv *= grad_T.unsqueeze(-1)
        dproducts = [dlogits_Tv.to(hidden_TD.dtype)]
        gradient_TD = self.stack.gradients(hidden_TD, parts, hidden, dproducts, True)
        assert gradient_TD is not None
        return gradient_TD

    def logits(self, hidden_BSD: Tensor, tasks: TokenTasks = NOBODYS) -> Tensor:
        """Return this rank's slice of the logits [B, S, v]."""
        hidden_BSD = copy_to_group(hidden_BSD, self.group)
        logits_Tv, _ = self._products(hidden_BSD.flatten(0, 1), self._parts(tasks))
        self.scale.applied_(logits_Tv)
        return logits_Tv.unflatten(0, hidden_BSD.shape[:2])

    def _parts(self, tasks: TokenTasks) -> list[Part]:
        return [] if self.stack is None else self.stack.parts(tasks)

    def _products(self, hidden_TD: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        if self.stack is None or not parts:
            return self.base(hidden_TD), []
        hidden = [part.hidden(hidden_TD[part.tokens]) for part in parts]
        (products_Tv,) = self.stack.products(hidden_TD, parts, hidden)
        return products_Tv, hidden
