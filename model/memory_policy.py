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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

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
        layer.forward = _under_policy(layer.forward, policy, keeps_last)  # type: ignore[method-assign]


def _under_policy(forward: Callable[..., Any], policy: str, keeps_last: bool) -> Callable[..., Any]:
    """Return a layer's forward pass such that it keeps what the policy says."""
    computed_again = COMPUTED_AGAIN[policy]

    @wraps(forward)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        outputs: list[Any] = []
        what = computed_again, keeps_last, outputs
        passes = (_Pass(*what, is_first=True), _Pass(*what, is_first=False))
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a layer draws numbers from a generator
            context_fn=lambda: passes,
            **kwargs,
        )

    return keeping
