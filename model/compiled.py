"""Functions that torch compiles, once for all layers and numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Round where eager code does; no pool of compiling processes in every rank for a few kernels.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "compile_threads": 1}
# Of the sizes that a kernel is compiled with torch decides what each of its blocks computes: with
# few tokens one warp 64 elements, which made the product of activations six times as slow on an
# H200.
TRIED_TOKENS = 1031
# A function is compiled anew for two widths of norms, for passes without gradients and with, for
# weights that are trained and not, and for views of several kinds; torch would give up after 8.
MOST_FORMS = 64


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled; torch compiles it when it is first called."""
    dynamo_config = torch._dynamo.config
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MOST_FORMS)
    return torch.compile(function, dynamic=True, options=OPTIONS)
