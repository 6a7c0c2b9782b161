"""LoRA dropout as a function of what is dropped: the same on every layout, device and packing.

Whether a feature of a token is kept follows from a key of the token (its sequence's noise seed, its
position), a key of the feature (layer, module, feature) and a hash of both; no generator is asked,
so no order of computing matters. A key of 64 bits serves four neighbouring features, 16 bits each.

Shape suffixes: N sequences, T tokens, I input features, i this rank's slice, W words of four
features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lobra.model.compiled import TRIED_TOKENS, compiled

UintArray = NDArray[np.uint64]

FEATURES_PER_WORD = 4
LEVELS = 1 << 16  # values of a feature's bits: probabilities are rounded to one part of these
STRIDE = 0x9E3779B97F4A7C15  # of a counter, odd and without pattern (SplitMix64's)
# An odd factor that mixes well in three xors of the upper with the lower half and two products.
FACTOR = 0xD6E8FEB86659FD93
SIGNED_FACTOR = FACTOR - (1 << 64)  # the same bits as an int64


@dataclass(frozen=True, eq=False)
class TokenNoise:
    """What dropout needs of a micro-batch's tokens, on the device.

    Attributes
    ----------
    keys_T
        int64 [T]: a token's key, from `token_keys`.
    limits_T1
        int16 [T, 1]: the least of a feature's bits that is kept.
    scales_T1
        [T, 1]: what kept features are multiplied by, 1 / (1 - p).
    """

    keys_T: Tensor
    limits_T1: Tensor
    scales_T1: Tensor

    @classmethod
    def of_tokens(cls, keys_T: Tensor, dropout_T: Tensor, dtype: torch.dtype) -> TokenNoise:
        """Return the noise of tokens with these keys and probabilities of being dropped."""
        limits_T = (dropout_T.double() * LEVELS).round().clamp(max=LEVELS - 1) - LEVELS // 2
        scales_T = 1.0 / (1.0 - dropout_T.double())
        return cls(keys_T, limits_T.to(torch.int16)[:, None], scales_T.to(dtype)[:, None])

    def part(self, tokens: slice) -> TokenNoise:
        """Return what dropout needs of some of the tokens."""
        return TokenNoise(self.keys_T[tokens], self.limits_T1[tokens], self.scales_T1[tokens])

    def at(self, places: Tensor) -> TokenNoise:
        """Return what dropout needs of the tokens at these places."""
        values = self.keys_T, self.limits_T1, self.scales_T1
        return TokenNoise(*(value.index_select(0, places) for value in values))

    def factors(self, features_W: Tensor, features: range) -> Tensor:
        """Return [T, i]: 0 or 1 / (1 - p), for some features of a linear's input.

        Parameters
        ----------
        features_W
            What `feature_keys` returns of the linear, on the device.
        features
            Which features, of all the linear has on all ranks.
        """
        start = features.start // FEATURES_PER_WORD
        stop = -(-features.stop // FEATURES_PER_WORD)
        words_TW = self.keys_T[:, None] ^ features_W[start:stop]
        lower_TW, upper_TW = words_TW.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
        lower_TW.bitwise_xor_(upper_TW)
        for _ in range(2):
            words_TW.mul_(SIGNED_FACTOR)
            lower_TW.bitwise_xor_(upper_TW)
        first = features.start - start * FEATURES_PER_WORD
        bits_Ti = words_TW.view(torch.int16)[:, first : first + len(features)]
        return (bits_Ti >= self.limits_T1) * self.scales_T1


@dataclass(frozen=True, eq=False)
class InputDropout:
    """What drops out of a linear's input, on this rank's features and some tokens.

    Attributes
    ----------
    noise
        The tokens'.
    features_W
        What `feature_keys` returns of the linear, on the device.
    features
        Which features, of all the linear has on all ranks.
    is_fused
        Whether factors are drawn in the one kernel that multiplies by them, and never stored.
    """

    noise: TokenNoise
    features_W: Tensor
    features: range
    is_fused: bool

    def left_of(self, x_Ti: Tensor) -> Tensor:
        """Return what is left of an input."""
        if self.is_fused:
            left_Ti: Tensor = self._fused(_left, x_Ti)
            return left_Ti
        return x_Ti * self._factors()

    def add_left(self, total_Ti: Tensor, x_Ti: Tensor) -> None:
        """Add what is left of a tensor of the input's shape."""
        if self.is_fused:
            self._fused(_add_left, total_Ti, x_Ti)
        else:
            total_Ti.addcmul_(x_Ti, self._factors())

    @torch.no_grad()
    def _fused(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """Call what is compiled; it is compiled once, whatever autograd knows of the tensors."""
        return compiled(function)(*(tensor.detach() for tensor in tensors), *self._drawn_from())

    def _factors(self) -> Tensor:
        return self.noise.factors(self.features_W, self.features)

    def _drawn_from(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        noise = self.noise
        return (
            noise.keys_T, noise.limits_T1, noise.scales_T1, self.features_W, self.features.start,
        )  # fmt: skip


def _left(
    x_Ti: Tensor, keys_T: Tensor, limits_T1: Tensor, scales_T1: Tensor, features_W: Tensor,
    start: int,
) -> Tensor:  # fmt: skip
    """Return x times what `TokenNoise.factors` returns, without words that features share."""
    features_i = torch.arange(start, start + x_Ti.shape[1], device=x_Ti.device)
    words_Ti = keys_T[:, None] ^ features_W[features_i // FEATURES_PER_WORD]
    words_Ti = words_Ti ^ (words_Ti >> 32 & 0xFFFFFFFF)
    for _ in range(2):
        words_Ti = words_Ti * SIGNED_FACTOR
        words_Ti = words_Ti ^ (words_Ti >> 32 & 0xFFFFFFFF)
    bits_Ti = words_Ti >> 16 * (features_i % FEATURES_PER_WORD) & LEVELS - 1
    signed_Ti = (bits_Ti ^ LEVELS // 2) - LEVELS // 2
    return x_Ti * ((signed_Ti >= limits_T1) * scales_T1)


def _add_left(total_Ti: Tensor, x_Ti: Tensor, *drawn_from: Any) -> None:
    total_Ti.add_(_left(x_Ti, *drawn_from))


def try_out_dropout(like: Tensor) -> None:
    """Compile what fused dropout calls; raise what a compiler raises.

    Parameters
    ----------
    like
        Any tensor of the device and dtype.
    """
    features = range(2, 1023)  # sizes that are equal would be taken for equal always
    keys_T = torch.arange(TRIED_TOKENS, device=like.device)
    noise = TokenNoise.of_tokens(keys_T, torch.full_like(keys_T, 0.5, dtype=like.dtype), like.dtype)
    dropout = InputDropout(noise, feature_keys(0, "", 1030).to(like.device), features, True)
    x_Ti = like.new_ones(TRIED_TOKENS, len(features))
    dropout.add_left(x_Ti, dropout.left_of(x_Ti))


def token_keys(
    noise_seeds_N: Sequence[int], lengths_N: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return int64 [T]: a key for every token of sequences laid end to end.

    Parameters
    ----------
    noise_seeds_N
        The sequences' own.
    lengths_N
        The sequences' tokens.
    """
    key_N = _mixed(np.array(noise_seeds_N, dtype=np.uint64) * np.uint64(STRIDE))
    lengths = np.asarray(lengths_N, dtype=np.int64)
    ends_N = np.cumsum(lengths)
    positions_T = np.arange(lengths.sum()) - np.repeat(ends_N - lengths, lengths)
    counters_T = positions_T.astype(np.uint64) * np.uint64(STRIDE)
    return _mixed(np.repeat(key_N, lengths) + counters_T).view(np.int64)


def feature_keys(layer: int, module: str, num_features: int) -> Tensor:
    """Return int64 [W]: a key for every four neighbouring features of a linear's input."""
    digest = hashlib.sha256(f"{layer}/{module}".encode()).digest()
    start = np.frombuffer(digest[:8], dtype="<u8")
    words = np.arange(-(-num_features // FEATURES_PER_WORD), dtype=np.uint64)
    return torch.from_numpy(_mixed(start + words * np.uint64(STRIDE)).view(np.int64))


def _mixed(words: UintArray) -> UintArray:
    """Return the words, each hashed."""
    half = np.uint64(32)
    words = words ^ (words >> half)
    for _ in range(2):
        words = words * np.uint64(FACTOR)
        words = words ^ (words >> half)
    return words
