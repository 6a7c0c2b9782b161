"""Functions that torch compiles, once for all layers and numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Round where eager code does; no pool of compiling processes in every rank for a few kernels.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True, "compile_threads": 1}


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled; torch compiles it when it is first called."""
    return torch.compile(function, dynamic=True, options=OPTIONS)
