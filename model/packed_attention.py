"""Causal attention of each sequence of a micro-batch; packed, none sees another in its row.

transformers calls `packed_attention` for every layer of a model whose configuration says
``_attn_implementation = "packed"``, once `register` has entered it under that name; the decoder
hands its keyword ``packing`` through to it. No mask is made.

Shape suffixes: T packed tokens, H query heads, K key and value heads, d features of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from lobra.model.memory_policy import keeping_attention
from lobra.model.precision import kept_dtype

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters)
except ImportError:  # before torch 2.10
    VARLEN_OPTIONS = frozenset()

#: Of query, key, value, scaling and sliding window the attention of rows.
Attend = Callable[[Tensor, Tensor, Tensor, float | None, int | None], Tensor]

PACKED = "packed"
AMPERE = (8, 0)  # compute capability; flash attention is not built for older cards
WIDEST_FLASH_HEAD, FLASH_HEAD_STEP = 256, 8


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the sequences of a packed micro-batch lie.

    Attributes
    ----------
    lengths
        The tokens of each sequence; they add up to T.
    offsets_N
        int32 [sequences + 1], on the device: where each sequence starts, and T.
    """

    lengths: tuple[int, ...]
    offsets_N: Tensor

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Packing:
        """Return the packing of sequences of these lengths."""
        offsets_N = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return cls(tuple(lengths), offsets_N)

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest sequence."""
        return max(self.lengths)


def register() -> str:
    """Enter `packed_attention` into transformers; return the name it goes by.

    cuDNN's attention is switched off: it plans for every new shape, which takes up to a second,
    and hardly two micro-batches have the same shape.
    """
    AttentionInterface.register(PACKED, packed_attention)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return PACKED


def packed_attention(
    module: torch.nn.Module | None,
    query_BHTd: Tensor,
    key_BKTd: Tensor,
    value_BKTd: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return the causal attention [B, T, H, d] of every sequence alone, and no weights.

    Parameters
    ----------
    module, attention_mask
        As transformers' attention functions take them; neither is used.
    query_BHTd, key_BKTd, value_BKTd
        H is a multiple of K.
    packing
        Where the sequences of the only row lie; without it every row is one, padded on its right.
    scaling
        What scores are multiplied by; without it 1 / sqrt(d).
    sliding_window
        How many tokens a token sees, itself included; without it all before it.
    softcap
        What scores are kept below, as softcap * tanh(score / softcap); no kernel of torch's does.
    """
    heads = query_BHTd, key_BKTd, value_BKTd
    attend: Attend = _of_rows if softcap is None else partial(_of_capped_rows, softcap=softcap)
    with keeping_attention():
        if packing is None:
            return attend(*heads, scaling, sliding_window), None
        if softcap is None and _is_fast(query_BHTd):
            return _varlen(*heads, packing, scaling, sliding_window), None
        return _one_by_one(attend, *heads, packing, scaling, sliding_window), None


def _is_fast(query: Tensor) -> bool:
    """Return whether torch's attention over sequences of different lengths takes the tensor."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= WIDEST_FLASH_HEAD
        and query.shape[-1] % FLASH_HEAD_STEP == 0
        and {"scale", "window_size"} <= VARLEN_OPTIONS  # not in its first version
        and _capability(query.device) >= AMPERE
    )


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _varlen(
    query_1HTd: Tensor,
    key_1KTd: Tensor,
    value_1KTd: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return the attention [1, T, H, d] by one kernel for all sequences."""
    query_THd, key_TKd, value_TKd = (
        heads.squeeze(0).transpose(0, 1) for heads in (query_1HTd, key_1KTd, value_1KTd)
    )
    options: dict[str, Any] = {}
    if query_THd.shape[1] > key_TKd.shape[1] and "enable_gqa" in VARLEN_OPTIONS:
        options["enable_gqa"] = True  # which torch 2.11 neither has nor asks for
    before = -1 if sliding_window is None else sliding_window - 1
    attended: Any = varlen_attn(
        query_THd,
        key_TKd,
        value_TKd,
        packing.offsets_N,
        packing.offsets_N,
        packing.longest,
        packing.longest,
        scale=scaling,
        window_size=(before, 0),
        **options,
    )
    attended_1THd: Tensor = attended.unsqueeze(0)
    return attended_1THd


def _one_by_one(
    attend: Attend,
    query_1HTd: Tensor,
    key_1KTd: Tensor,
    value_1KTd: Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return the attention [1, T, H, d], in any precision on any device, sequence by sequence.

    On CPU nothing was faster: neither sequences of equal or similar lengths computed together, for
    which they must be gathered, nor a function of its own that spares the copies of the parts.
    """
    of_sequences = zip(
        *(x.split(packing.lengths, dim=2) for x in (query_1HTd, key_1KTd, value_1KTd)), strict=True
    )
    return torch.cat(
        [attend(query, key, value, scaling, sliding_window) for query, key, value in of_sequences],
        dim=1,
    )


def _of_rows(
    query_BHTd: Tensor,
    key_BKTd: Tensor,
    value_BKTd: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Return the attention [B, T, H, d], each row one sequence."""
    length = query_BHTd.shape[2]
    repeats = query_BHTd.shape[1] // key_BKTd.shape[1]
    grouped = repeats > 1 and not query_BHTd.is_cuda
    if repeats > 1 and not grouped:  # grouped heads would have CUDA store all scores
        key_BKTd, value_BKTd = (x.repeat_interleave(repeats, dim=1) for x in (key_BKTd, value_BKTd))
    mask = None
    if sliding_window is not None and length > sliding_window:
        mask = _window_mask(length, sliding_window, query_BHTd.device)
    attended_BHTd = functional.scaled_dot_product_attention(
        query_BHTd, key_BKTd, value_BKTd, mask, is_causal=mask is None, scale=scaling,
        enable_gqa=grouped,
    )  # fmt: skip
    return attended_BHTd.transpose(1, 2)


def _of_capped_rows(
    query_BHTd: Tensor,
    key_BKTd: Tensor,
    value_BKTd: Tensor,
    scaling: float | None,
    sliding_window: int | None,
    *,
    softcap: float,
) -> Tensor:
    """Return the attention [B, T, H, d] with capped scores, each row one sequence.

    It holds all scores of a sequence, as transformers' own does.
    """
    length = query_BHTd.shape[2]
    repeats = query_BHTd.shape[1] // key_BKTd.shape[1]
    if repeats > 1:
        key_BKTd, value_BKTd = (x.repeat_interleave(repeats, dim=1) for x in (key_BKTd, value_BKTd))
    scaling = query_BHTd.shape[-1] ** -0.5 if scaling is None else scaling
    scores_BHTT = query_BHTd @ key_BKTd.transpose(2, 3) * scaling
    scores_BHTT = (scores_BHTT / softcap).tanh() * softcap
    seen = _window_mask(length, sliding_window or length, query_BHTd.device)
    scores_BHTT = scores_BHTT.masked_fill(~seen, -torch.inf)
    shares_BHTT = scores_BHTT.softmax(dim=-1, dtype=kept_dtype(scores_BHTT.dtype))
    attended_BHTd = shares_BHTT.to(value_BKTd.dtype) @ value_BKTd
    return attended_BHTd.transpose(1, 2)


def _window_mask(length: int, sliding_window: int, device: torch.device) -> Tensor:
    """Return bool [s, s]: which tokens each token sees, at most `sliding_window` of them."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril_().triu_(1 - sliding_window)
