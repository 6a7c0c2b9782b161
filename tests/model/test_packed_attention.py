"""Packed attention is each sequence's own, in value and gradient, alone and inside whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import eager_attention_forward

from lobra.model import packed_attention as module
from lobra.model.packed_attention import Packing, packed_attention, register
from lobra.model.precision import NothingBelowDouble
from tests.model.decoders import HIDDEN_SIZE, small_decoder
from tests.model.support import FAMILIES

HEAD_DIM = 8
ALTERNATING = {
    "sliding_window": 5,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
}
MODELS = [(family, {}) for family in FAMILIES]
MODELS += [("mistral", {"sliding_window": 5}), ("qwen2", ALTERNATING), ("qwen3", ALTERNATING)]

packed_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def random_heads(lengths: list[int], heads: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    """Return fp64 query, key and value [1, heads, T, d] that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, number, sum(lengths), HEAD_DIM) for number in (heads, kv_heads, kv_heads)]
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [heads.requires_grad_() for heads in drawn]


def alone(heads: list[Tensor], lengths: list[int], scaling: float, window: int | None) -> Tensor:
    """Return transformers' own eager attention of one sequence after the other."""

    class Attention(torch.nn.Module):
        num_key_value_groups = heads[0].shape[1] // heads[1].shape[1]

    outputs = []
    for query, key, value in zip(*(x.split(lengths, dim=2) for x in heads), strict=True):
        place = torch.arange(query.shape[2])
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (window or len(place)))
        mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, -torch.inf)
        with NothingBelowDouble():
            outputs.append(
                eager_attention_forward(Attention(), query, key, value, mask, scaling=scaling)[0]
            )
    return torch.cat(outputs, dim=1)


def assert_same(ours: Tensor, expected: Tensor, inputs: list[Tensor], atol: float) -> None:
    """Assert that values and gradients agree."""
    torch.testing.assert_close(ours, expected, rtol=0, atol=atol)
    towards = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(ours)
    pairs = (torch.autograd.grad(output, inputs, towards) for output in (ours, expected))
    for gradient, other in zip(*pairs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=atol)


@given(
    packed_lengths,
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.one_of(st.none(), st.integers(1, 45)),
    st.floats(0.1, 1.0),
)
def test_each_sequence_attends_to_itself_alone(
    lengths: list[int], kv_heads: int, repeats: int, window: int | None, scaling: float
) -> None:
    heads = random_heads(lengths, kv_heads * repeats, kv_heads)
    ours, weights = packed_attention(
        None, *heads, None, packing=Packing.of_lengths(lengths), scaling=scaling,
        sliding_window=window,
    )  # fmt: skip
    assert weights is None
    assert_same(ours, alone(heads, lengths, scaling, window), heads, 1e-12)


@pytest.mark.parametrize("knows_groups", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_one_kernel_is_asked_for_the_same(
    monkeypatch: pytest.MonkeyPatch, knows_groups: bool, window: int | None
) -> None:
    """What is asked of torch's kernel, which no CPU has, is what each sequence alone gives."""
    lengths = [3, 1, 20]
    heads = random_heads(lengths, 4, 2)

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, starts: Tensor, starts_of_keys: Tensor,
        longest: int, longest_keys: int, *, scale: float, window_size: tuple[int, int],
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert starts.dtype == torch.int32 and torch.equal(starts, starts_of_keys)
        assert longest == longest_keys == max(lengths) and window_size[1] == 0
        assert enable_gqa == knows_groups and query.shape[1] == 2 * key.shape[1]
        outputs = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            part = [x[None, start:end].transpose(1, 2) for x in (query, key, value)]
            seen = None if window_size[0] < 0 else window_size[0] + 1
            outputs.append(alone(part, [end - start], scale, seen)[0])
        return torch.cat(outputs)

    options = {"window_size", "enable_gqa"} if knows_groups else {"window_size"}
    monkeypatch.setattr(module, "VARLEN_OPTIONS", frozenset(options))
    monkeypatch.setattr(module, "varlen_attn", kernel, raising=False)
    monkeypatch.setattr(module, "_is_fast", lambda query: True)
    ours, _ = packed_attention(
        None, *heads, None, packing=Packing.of_lengths(lengths), scaling=0.3, sliding_window=window
    )
    assert_same(ours, alone(heads, lengths, 0.3, window), heads, 1e-12)


@pytest.mark.parametrize(("family", "overrides"), MODELS)
def test_a_packed_model_is_the_model_of_each_sequence(
    family: str, overrides: dict[str, Any]
) -> None:
    lengths = [9, 1, 14, 2]
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(1, sum(lengths), HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    embedded.requires_grad_()
    options = {"attention_mask": None, "use_cache": False}
    ours = small_decoder(family, register(), **overrides)(
        inputs_embeds=embedded,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        packing=Packing.of_lengths(lengths),
        **options,
    ).last_hidden_state
    model = small_decoder(family, "eager", **overrides)
    expected = [
        model(inputs_embeds=part, **options).last_hidden_state
        for part in embedded.split(lengths, dim=1)
    ]
    assert_same(ours, torch.cat(expected, dim=1), [embedded], 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("window", [None, 50])
def test_on_a_gpu_it_is_as_near_as_its_precision(dtype: torch.dtype, window: int | None) -> None:
    lengths = [300, 1, 70, 129]
    heads = [x.detach().to("cuda", dtype).requires_grad_() for x in random_heads(lengths, 4, 2)]
    exact = [x.detach().cpu().double().requires_grad_() for x in heads]
    packing = Packing.of_lengths(lengths, "cuda")
    ours, _ = packed_attention(
        None, *heads, None, packing=packing, scaling=0.3, sliding_window=window
    )
    expected = alone(exact, lengths, 0.3, window)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [ours, *torch.autograd.grad(ours, heads, towards.cuda())]
    wanted = [expected, *torch.autograd.grad(expected, exact, towards.double())]
    for got, right in zip(found, wanted, strict=True):
        error = (got.detach().cpu().double() - right.detach()).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * right.detach().abs().max()
