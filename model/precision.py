"""The precisions a stage can run in, and what fp64 asks of code that was written for less.

fp64 is for proofs: in it two ways to compute the same thing agree to twelve digits, on any
processor, where fp32 leaves room for doubt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what adapters, gradients, moments and losses are kept in beside activations of dtype.

    fp32, so that bf16 does not lose small updates; in fp64 everything is fp64.
    """
    return torch.promote_types(dtype, torch.float32)


class NothingBelowDouble(TorchFunctionMode):
    """While active, whatever asks torch for fp32 gets fp64.

    transformers' norms, rotary tables and eager softmax cast to fp32 by name: more than bf16 has,
    but less than fp64.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call func with every fp32 among its arguments read as fp64."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        double = {name: _no_less(value) for name, value in (kwargs or {}).items()}
        return func(*map(_no_less, args), **double)


def _no_less(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def in_double(module: nn.Module) -> None:
    """Have the module's forward pass cast nothing to fp32, also when it is computed again."""
    forward: Callable[..., Any] = module.forward

    @wraps(forward)
    def double_forward(*args: Any, **kwargs: Any) -> Any:
        with NothingBelowDouble():
            return forward(*args, **kwargs)

    module.forward = double_forward  # type: ignore[method-assign]
