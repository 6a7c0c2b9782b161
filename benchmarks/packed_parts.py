"""What packed attention and LoRA dropout take, each beside what it replaces.

Attention, forward and backward, of one micro-batch of real lengths: packed, by FlexAttention (on a
CPU forward only, uncompiled: it has no more there), whose mask is made once a micro-batch, and in
rows padded to the longest. Dropout: the factors of a linear's input, by hashing keys and as torch
draws them. The least of several alternating runs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.sides.job import JOBS
from benchmarks.sides.lengths import find_lengths
from lobra.model.dropout import TokenNoise, feature_keys, token_keys
from lobra.model.packed_attention import Packing, packed_attention, register

CONTEXTS = (512, 4096)  # where sequences are cut
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of Llama 3.1 8B; of these, on CPU an eighth
FEATURES = 14336
DROPOUT = 0.1
RUNS = 7


def packed_parts(
    *,
    lengths: Path | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    max_tokens: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Time attention and dropout of a micro-batch, each beside what it replaces.

    Parameters
    ----------
    lengths
        JSON of lengths by data set.
    max_tokens
        Of the micro-batch; by default 8,192, on a CPU 1,024.
    """
    max_tokens = max_tokens or (8192 if device == "cuda" else 1024)
    register()
    place = torch.device(device)
    known = np.concatenate(list(find_lengths(JOBS["cpu"].datasets, lengths).of.values())).tolist()
    for context in CONTEXTS:
        drawn = micro_batch_lengths(known, min(context, max_tokens), max_tokens)
        yield from timed(f"attention, cut at {context}", sum(drawn), attention_ways(drawn, place))
    yield from timed("dropout", max_tokens, dropout_ways(max_tokens, place))


def micro_batch_lengths(known: list[int], context: int, max_tokens: int) -> list[int]:
    """Return the lengths of sequences that just fill a micro-batch."""
    drawn = random.Random(0)
    lengths = [min(drawn.choice(known), context)]
    while sum(lengths) + (length := min(drawn.choice(known), context)) <= max_tokens:
        lengths.append(length)
    return lengths


def attention_ways(lengths: list[int], device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what runs attention forward and backward, by the way it goes."""
    share = 8 if device.type == "cpu" else 1
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    packing = Packing.of_lengths(lengths, device)

    def random_heads(rows: int, length: int, number: int) -> Tensor:
        size = rows, length, number // share, HEAD_DIM
        return torch.randn(size, device=device, dtype=dtype).transpose(1, 2).requires_grad_()

    def heads(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        query = random_heads(rows, length, HEADS)
        return query, random_heads(rows, length, KV_HEADS), random_heads(rows, length, KV_HEADS)

    packed, padded = heads(1, sum(lengths)), heads(len(lengths), packing.longest)
    sequence_of_T = torch.repeat_interleave(torch.tensor(lengths)).to(device)

    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (sequence_of_T[query] == sequence_of_T[key]) & (query >= key)

    def flex_mask() -> BlockMask:
        num_tokens = len(sequence_of_T)
        return create_block_mask(sees, None, None, num_tokens, num_tokens, device=device.type)

    mask = flex_mask()
    compiled = torch.compile(flex_attention, dynamic=True)

    def flex() -> None:
        if device.type == "cpu":
            query, key, value = (x.detach() for x in packed)
            flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        else:
            backward(compiled(*packed, block_mask=mask, enable_gqa=True))

    return {
        "packed": lambda: backward(packed_attention(None, *packed, None, packing=packing)[0]),
        "flex": flex,
        "flex's mask": flex_mask,
        "padded": lambda: backward(packed_attention(None, *padded, None)[0]),
    }


def backward(output: Tensor) -> None:
    """Run the backward pass."""
    output.backward(torch.ones_like(output))


def dropout_ways(num_tokens: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what makes the factors of a linear's input, by the way it goes."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    keys_T = torch.from_numpy(token_keys([1], [num_tokens])).to(device)
    dropout_T = torch.full((num_tokens,), DROPOUT, device=device)
    noise = TokenNoise.of_tokens(keys_T, dropout_T, dtype)
    features_W = feature_keys(0, "down_proj", FEATURES).to(device)
    size = (num_tokens, FEATURES)
    return {
        "hashed": lambda: noise.factors(features_W, range(FEATURES)),
        "drawn": lambda: (torch.rand(size, device=device) >= DROPOUT).to(dtype) / (1 - DROPOUT),
    }


def timed(
    part: str, num_tokens: int, ways: Mapping[str, Callable[[], object]]
) -> Iterator[dict[str, Any]]:
    """Run the ways in turn and yield the least time of each."""
    least_s = dict.fromkeys(ways, float("inf"))
    for _ in range(RUNS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            least_s[name] = min(least_s[name], time.perf_counter() - start)
    for name, seconds in least_s.items():
        yield {"part": part, "way": name, "tokens": num_tokens, "ms": 1000 * seconds}
