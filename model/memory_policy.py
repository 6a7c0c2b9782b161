"""What a layer keeps for its backward pass, as its layout's memory policy says.

A layer keeps its input and the outputs of its products and of its attention; norms, rotary
embeddings and the product of activations are computed again, which takes little time and would
take most of the memory. The layer's forward pass runs again for it in the backward pass, whatever
its family: each product and attention then gives what it gave before, without computing it and
without a collective. Code that is dear says so by `kept`, or by `keeping_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from lobra.layout.layout import ATTENTION, COMPUTED_AGAIN

Output = TypeVar("Output")  # a tensor, or a tuple of what an operation returns

#: Nothing after the last product of a layer needs what it gave, unless a norm follows.
LAST_PRODUCT = "down_proj"
NORMS_BEHIND = ("post_feedforward_layernorm", "post_mlp_layernorm")


class _Pass:
    """One run of a layer: the first, which keeps, or one in the backward pass, which is given."""

    def __init__(
        self,
        computed_again: frozenset[str],
        keeps_last: bool,
        outputs: list[Any],
        is_first: bool,
    ) -> None:
        self.computed_again = computed_again
        self.keeps_last = keeps_last
        self.outputs = outputs
        self.is_first = is_first
        self.given: Iterator[Any] = iter(())
        self.outer: _Pass | None = None
        self.is_trained = False

    def __enter__(self) -> Self:
        self.outer = _current.get()
        self.given = iter(self.outputs)
        _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.set(self.outer)

    def output(self, name: str, compute: Callable[[], Output]) -> Output:
        """Return what is computed under this name, or was in the first pass."""
        if name in self.computed_again:
            return compute()
        if not self.is_first:
            return _detached(next(self.given))
        output = compute()
        is_needed = name != LAST_PRODUCT or self.keeps_last
        self.outputs.append(_detached(output) if is_needed else _nothing_like(output))
        return output


_current: ContextVar[_Pass | None] = ContextVar("pass of the layer that is running", default=None)


def _detached(output: Any) -> Any:
    """Return the output with tensors of their own, which share its memory but not its history."""
    if isinstance(output, Tensor):
        return output.detach()
    return tuple(map(_detached, output)) if isinstance(output, tuple) else output


def _nothing_like(output: Any) -> Any:
    """Return tensors of the same shapes that take no memory; NaN, should they be used after all."""
    if isinstance(output, tuple):
        return tuple(map(_nothing_like, output))
    return _nan(output.dtype, output.device).expand_as(output)


@cache
def _nan(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype, device=device)


def kept(name: str, compute: Callable[[], Output]) -> Output:
    """Return ``compute()``; when a layer is computed again, return what it returned before.

    Parameters
    ----------
    name
        The linear's name, `ATTENTION` or `ADAPTER_HIDDEN`: what the policies go by.
    compute
        Makes tensors without history: called in the forward pass of an autograd function, or below
        autograd. The function itself runs again, and must save the same tensors again.
    """
    current = _current.get()
    return compute() if current is None else current.output(name, compute)


class _AttentionKept(TorchDispatchMode):
    """Keeps what attention's operations return, those of torch with their own backward."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        is_attention = "attention" in func.name() or "attn" in func.name()
        return kept(ATTENTION, run) if is_attention else run()


def keeping_attention() -> AbstractContextManager[object]:
    """Return a context in which what torch's attention returns is kept as the policy says."""
    return nullcontext() if _current.get() is None else _AttentionKept()


def is_autograds_own(policy: str, device: torch.device) -> bool:
    """Return whether a policy is to be left to autograd, which keeps all that layers compute.

    On a CPU "keep" is: computing again what is elementwise took 1 to 4 % of the time of layers of
    hidden size 512 and 256 there (12 % in small micro-batches), and half of that of size 64.
    """
    return policy == "keep" and device.type == "cpu"


def apply_policy(layers: Iterable[nn.Module], policy: str) -> None:
    """Have each layer keep what the policy says.

    transformers' own switch for gradient checkpointing would leave out of what is computed again
    what was wrapped around a layer's forward pass, such as the precision it runs in.
    """
    for layer in layers:
        keeps_last = any(hasattr(layer, name) for name in NORMS_BEHIND)
        layer.forward = _under_policy(layer, policy, keeps_last)  # type: ignore[method-assign]


def trains() -> None:
    """Say that the layer which is running computes with something that is trained."""
    if (current := _current.get()) is not None:
        current.is_trained = True


def _under_policy(layer: nn.Module, policy: str, keeps_last: bool) -> Callable[..., Any]:
    """Return a layer's forward pass such that it keeps what the policy says."""
    forward = layer.forward
    computed_again = COMPUTED_AGAIN[policy]
    anchor = torch.zeros((), requires_grad=True)

    @wraps(forward)
    def keeping(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(hidden_states, *args, **kwargs)
        outputs: list[Any] = []

        def run(hidden: Tensor, is_first: bool) -> tuple[Tensor, bool]:
            with _Pass(computed_again, keeps_last, outputs, is_first) as running:
                output: Tensor = forward(hidden, *args, **kwargs)
            is_trained = running.is_trained or hidden_states.requires_grad
            return output, is_trained or any(one.requires_grad for one in layer.parameters())

        return _RunAgain.apply(hidden_states, anchor, run)

    return keeping


class _RunAgain(torch.autograd.Function):
    """A layer of hidden states that runs again for its backward pass.

    torch's own checkpoint has autograd record the first run, too, and put a stand-in in the place
    of every tensor it keeps: on a CPU twice the work for the host beyond that of the layer itself.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, _: Tensor, run: Callable[[Tensor, bool], tuple[Tensor, bool]]
    ) -> Tensor:
        output, is_trained = run(hidden.detach(), True)
        if is_trained:
            ctx.save_for_backward(hidden)
            ctx.run = run
        else:
            ctx.mark_non_differentiable(output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        run, ctx.run = ctx.run, None  # what it keeps is freed here, not with the whole graph
        hidden = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            edge = get_gradient_edge(run(hidden, False)[0])  # the output itself is needed no more
        del run
        torch.autograd.backward(edge, gradient)
        return hidden.grad, None, None
