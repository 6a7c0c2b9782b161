"""Dropout's factors follow from what is dropped alone, and look drawn at random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch._dynamo.utils import counters

from lobra.model import dropout as dropout_module
from lobra.model.dropout import (
    InputDropout,
    TokenNoise,
    feature_keys,
    token_keys,
    try_out_dropout,
)

SEED, LAYER, MODULE = 2**55 + 11, 5, "up_proj"
MASK = 2**64 - 1


def factors(
    *,
    seed: int = SEED,
    layer: int = LAYER,
    module: str = MODULE,
    tokens: int = 512,
    features: int = 512,
    dropout: float = 0.5,
    device: str = "cpu",
) -> Tensor:
    """Return the factors [T, I] of one sequence."""
    keys = torch.from_numpy(token_keys([seed], [tokens])).to(device)
    noise = TokenNoise.of_tokens(
        keys, torch.full_like(keys, dropout, dtype=torch.float64), torch.float32
    )
    return noise.factors(feature_keys(layer, module, features).to(device), range(features))


def hashed(word: int) -> int:
    """Return one word's hash in Python's own integers."""
    word ^= word >> 32
    for _ in range(2):
        word = word * 0xD6E8FEB86659FD93 & MASK
        word ^= word >> 32
    return word


def test_bits_are_those_of_whole_numbers_without_wraparound() -> None:
    """The same hash in integers of any size: what a device may not compute otherwise."""
    key = hashed(SEED * 0x9E3779B97F4A7C15 & MASK)
    words = [word & MASK for word in feature_keys(LAYER, MODULE, 12).tolist()]
    found = factors(tokens=7, features=12)
    for position in range(7):
        token = hashed(key + position * 0x9E3779B97F4A7C15 & MASK)
        for feature in range(12):
            bits = hashed(token ^ words[feature // 4]) >> 16 * (feature % 4) & 0xFFFF
            signed = bits - 0x10000 if bits >= 0x8000 else bits
            assert found[position, feature] == (2.0 if signed >= 0 else 0.0)


@given(
    st.lists(st.tuples(st.integers(0, 2**56 - 1), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 40),
    st.data(),
)
def test_a_sequence_is_dropped_alike_in_any_company_and_any_slice(
    sequences: list[tuple[int, int]], num_features: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, num_features - 1))
    part = range(start, data.draw(st.integers(start + 1, num_features)))
    features = feature_keys(LAYER, MODULE, num_features)

    def of_tokens(rows: list[tuple[int, int]], columns: range) -> Tensor:
        keys = torch.from_numpy(token_keys(*zip(*rows, strict=True)))
        dropout = torch.tensor([0.25 * (row[0] % 3) for row in rows for _ in range(row[1])])
        return TokenNoise.of_tokens(keys, dropout, torch.float64).factors(features, columns)

    alone = [of_tokens([sequence], range(num_features)) for sequence in sequences]
    assert torch.equal(of_tokens(sequences, part), torch.cat(alone)[:, part.start : part.stop])


def results_of_dropout(
    is_fused: bool, dtype: torch.dtype, device: str, tokens: int, features: range
) -> tuple[Tensor, Tensor]:
    """Return what is left of an input, and of the same input added to one."""
    drawn = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, len(features), generator=drawn).to(device, dtype)
    keys = torch.from_numpy(token_keys([SEED], [tokens])).to(device)
    odds = torch.full((tokens,), 0.3, device=device)
    noise = TokenNoise.of_tokens(keys, odds, dtype)
    words = feature_keys(LAYER, MODULE, features.stop + 3).to(device)
    dropout, total = InputDropout(noise, words, features, is_fused), torch.ones_like(x)
    dropout.add_left(total, x)
    return dropout.left_of(x), total


@pytest.mark.parametrize("features", [range(16), range(5, 11), range(3, 4)])
def test_fused_it_drops_the_same(features: range, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is compiled, not compiled."""
    monkeypatch.setattr(dropout_module, "compiled", lambda function: function)
    own, fused = (
        results_of_dropout(is_fused, torch.float64, "cpu", 50, features)
        for is_fused in (False, True)
    )
    assert torch.equal(own[0], fused[0])
    torch.testing.assert_close(own[1], fused[1], rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.long),  # compiling takes seconds
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_compiled_once_it_drops_the_same(device: str) -> None:
    """For any number of tokens and slice of the features."""
    torch._dynamo.reset()
    counters.clear()
    like = torch.ones(1, device=device, dtype=torch.bfloat16)
    try_out_dropout(like)
    tried = counters["stats"]["unique_graphs"]
    assert tried == 2
    for tokens in (2, 3, 40, 1000):
        for features in (range(64), range(8, 24), range(5, 11)):
            own, fused = (
                results_of_dropout(is_fused, torch.bfloat16, device, tokens, features)
                for is_fused in (False, True)
            )
            assert torch.equal(own[0], fused[0])
            # The product is rounded before it is added, or it is not.
            torch.testing.assert_close(own[1], fused[1], rtol=2**-7, atol=2**-7)
    assert counters["stats"]["unique_graphs"] == tried, "compiled again"


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(dropout: float) -> None:
    found = factors(dropout=dropout, tokens=1000, features=1000)
    assert set(found.unique().tolist()) <= {0.0, float(np.float32(1 / (1 - dropout)))}
    dropped = int((found == 0).sum())
    deviation = (dropout * (1 - dropout) * found.numel()) ** 0.5
    assert abs(dropped - dropout * found.numel()) <= 4 * deviation + found.numel() / 2**17


@pytest.mark.parametrize(
    "other",
    [{"seed": SEED + 1}, {"seed": SEED + 2}, {"layer": LAYER + 1}, {"module": "gate_proj"}],
)
def test_neighbours_are_not_correlated(other: dict) -> None:
    """Between neighbouring seeds, layers, modules, positions and features."""
    kept = (factors() > 0).double() - 0.5
    pairs = [(kept, (factors(**other) > 0).double() - 0.5)]
    pairs += [(kept[shift:], kept[:-shift]) for shift in (1, 2, 7, 64)]
    pairs += [(kept[:, shift:], kept[:, :-shift]) for shift in (1, 2, 3, 4, 8, 64)]
    for left, right in pairs:
        correlation = 4 * float((left * right).mean())
        assert abs(correlation) <= 4.5 / left.numel() ** 0.5


@pytest.mark.parametrize("axis", [0, 1])
def test_the_number_kept_of_a_token_or_feature_is_binomial(axis: int) -> None:
    """By chi-square; a pattern along rows or columns would narrow or widen it."""
    number = (factors(tokens=2048, features=2048, dropout=0.3) > 0).sum(axis).numpy()
    edges = stats.binom.ppf(np.linspace(0, 1, 21)[1:-1], 2048, 0.7)
    found = np.bincount(np.searchsorted(edges, number), minlength=20)
    below = np.append(stats.binom.cdf(edges, 2048, 0.7), 1.0)
    assert stats.chisquare(found, np.diff(below, prepend=0.0) * len(number)).pvalue > 1e-4


def test_every_level_is_as_likely() -> None:
    """By chi-square, over the probabilities at which features begin to be dropped."""
    levels = np.linspace(0, 1, 33)[1:-1]
    dropped = np.array([int((factors(dropout=level) == 0).sum()) for level in levels])
    found = np.diff(np.concatenate([[0], dropped, [512 * 512]]))
    assert stats.chisquare(found).pvalue > 1e-4


@pytest.mark.gpu
def test_a_gpu_has_the_same_bits() -> None:
    assert torch.equal(factors(device="cuda").cpu(), factors())
