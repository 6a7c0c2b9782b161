"""PiSSA: an adapter that starts as a weight's principal part (arXiv 2404.02948).

    y = (W - s B0 A0) x + s B A x,    A0 and B0 the largest singular vectors, where A and B start

The base stays as it is, since all tasks share it: what PEFT takes out of W is here a second, frozen
pair of factors, A0 and B0 with scale -s. Written for PEFT both pairs are one plain LoRA of twice
the rank on the published base: [A; A0] and [B, -B0].

Shape suffixes: I input features, O output features, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def principal_factors(weight_OI: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A [r, I] and B [O, r], fp32, with scaling * B A the weight's best part of that rank.

    Each has the square root of the singular values, as PEFT shares them out.
    """
    left_Or, values_r, right_rI = torch.linalg.svd(weight_OI.float(), full_matrices=False)
    roots_r = (values_r[:rank] / scaling).sqrt()
    return roots_r[:, None] * right_rI[:rank], left_Or[:, :rank] * roots_r


def joined(trained: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the plain LoRA (PEFT's names and shapes) of trained tensors and those at the start."""
    found = dict(trained)
    for name in filter(_is_factor, trained):
        other = start[name] if _is_A(name) else -start[name]
        found[name] = torch.cat([trained[name], other], _ranks(name))
    return found


def divided(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the trained tensors and those at the start of a plain LoRA that `joined` made."""
    trained, start = dict(named), dict(named)
    for name in filter(_is_factor, named):
        trained[name], other = named[name].chunk(2, _ranks(name))
        start[name] = other if _is_A(name) else -other
    return trained, start


def trained_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the trained part of a tensor that `joined` made."""
    if not _is_factor(name):
        return shape
    halved = list(shape)
    halved[_ranks(name)] //= 2
    return tuple(halved)


def _is_factor(name: str) -> bool:
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def _is_A(name: str) -> bool:
    return name.endswith(".lora_A.weight")


def _ranks(name: str) -> int:
    """Return the dimension that counts ranks."""
    return 0 if _is_A(name) else 1
