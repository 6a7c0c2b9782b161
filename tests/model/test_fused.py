"""Fused norms, rotary embeddings and MLPs compute what transformers' own modules compute."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lobra.layout.layout import MEMORY_POLICIES
from lobra.model import fused
from lobra.model.compiled import compiled
from lobra.model.fused import fuse, fuse_modules, try_out
from lobra.model.memory_policy import apply_policy
from lobra.model.packed_attention import Packing, register
from lobra.model.precision import in_double
from tests.model.decoders import HIDDEN_SIZE, small_decoder
from tests.model.support import FAMILIES

LENGTHS = [5, 1, 9]
#: Of a layer.
NORMS = {"qwen3": 4, "gemma2": 4, "gemma3_text": 6, "olmo2": 4, "glm4": 4}
#: Gate and up are one linear, whose output is cut.
UNGATED = ("phi3", "glm", "glm4")
families = pytest.mark.parametrize("family", FAMILIES)
on_both = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.long),  # compiling takes seconds
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield
    compiled.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Have nothing compiled; return how often what would have been is called."""
    called: Counter[str] = Counter()

    def uncompiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            called[function.__name__] += 1
            return function(*args, **options)

        return counted

    monkeypatch.setattr(torch, "compile", uncompiled)
    return called


def gradient_and_output(decoder: Any, lengths: list[int] = LENGTHS) -> tuple[Tensor, Tensor]:
    embedded, output = output_of(decoder, lengths, is_learned=True)
    generator = torch.Generator().manual_seed(2)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output))
    assert embedded.grad is not None
    return embedded.grad, output


def output_of(decoder: Any, lengths: list[int], is_learned: bool) -> tuple[Tensor, Tensor]:
    """Return random embeddings, whose gradient may be wanted, and the decoder's output."""
    generator = torch.Generator().manual_seed(1)
    size = (1, sum(lengths), HIDDEN_SIZE)
    embedded = torch.randn(size, generator=generator, dtype=torch.float64)
    embedded = embedded.to(decoder.device, decoder.dtype).requires_grad_(is_learned)
    positions = torch.cat([torch.arange(length) for length in lengths])
    output = decoder(
        inputs_embeds=embedded,
        position_ids=positions[None].to(decoder.device),
        attention_mask=None,
        use_cache=False,
        packing=Packing.of_lengths(lengths, decoder.device),
    ).last_hidden_state
    return embedded, output


@families
@pytest.mark.parametrize("policy", [None, *MEMORY_POLICIES])
def test_what_is_compiled_is_the_family_s_own(
    family: str, policy: str | None, calls: Counter[str]
) -> None:
    """In fp64, also where a layer is computed again."""
    expected = gradient_and_output(small_decoder(family, register()))
    decoder = small_decoder(family, register())
    fuse_modules(decoder)
    in_double(decoder.norm)  # of a layer all is already
    if policy is not None:
        apply_policy(decoder.layers, policy)
    for ours, theirs in zip(gradient_and_output(decoder), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    layers, passes = 2, 1 if policy is None else 2
    norms = NORMS.get(family, 2)
    assert calls == {
        "forward": norms * layers * passes + 1,  # of the norms
        "apply_rotary_pos_emb": layers * passes,
        **({} if family in UNGATED else {"_product": layers * passes}),
    }
    calls.clear()
    gradient_and_output(small_decoder(family, register()))
    assert not calls, "other models are left alone"


def test_other_precisions_and_processors_stay_as_they_are(calls: Counter[str]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        decoder = small_decoder("llama", register()).to(dtype)
        fuse(decoder)
        assert not any("forward" in vars(layer.mlp) for layer in decoder.layers)
    assert not calls


def test_an_mlp_that_computes_something_else_stays_as_it_is(calls: Counter[str]) -> None:
    decoder = small_decoder("llama", register())
    mlp = type(decoder.layers[0].mlp)

    class Doubled(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return 2.0 * mlp.forward(self, x)

    class Normed(mlp):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    decoder.layers[0].mlp.__class__ = Doubled
    decoder.layers[1].mlp.__class__ = Normed
    fuse_modules(decoder)
    assert not any("forward" in vars(layer.mlp) for layer in decoder.layers)
    assert all("forward" in vars(layer.input_layernorm) for layer in decoder.layers)


def test_without_a_compiler_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*_: Any, **__: Any) -> Any:
            raise RuntimeError("Cannot find a working triton installation\nand a long story")

        return compiled

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(fused, "_is_faster", lambda weight: True)
    decoder = small_decoder("llama", register()).bfloat16()
    with caplog.at_level(logging.WARNING):
        fuse(decoder)
    assert [record.message for record in caplog.records] == [
        "norms, activations and dropout run unfused, as torch cannot compile: "
        "Cannot find a working triton installation"
    ]
    assert not any("forward" in vars(layer.input_layernorm) for layer in decoder.layers)


@on_both
@pytest.mark.parametrize("family", ["qwen3", "gemma"])  # both kinds of norms and of activations
def test_compiled_once_it_rounds_as_transformers_does(family: str, device: str) -> None:
    """Outputs and gradients, up to bf16's last bit, of any number of tokens."""
    decoder = half_decoder(family, device)
    try_out(decoder)
    tried = counters["stats"]["unique_graphs"]
    pairs = [pair for module in decoder.modules() for pair in own_and_fused(module, decoder)]
    for tokens in (2, 3, 40, 1000):
        for own, ours, sizes in pairs:
            results = []
            for function in (own, ours):
                drawn = torch.Generator().manual_seed(tokens)
                inputs = [
                    torch.randn(1, tokens, *size, generator=drawn)
                    .to(device, torch.bfloat16)
                    .requires_grad_()
                    for size in sizes
                ]
                outputs = function(*inputs)
                towards = [torch.randn(x.shape, generator=drawn).to(x) for x in outputs]
                results.append([*outputs, *torch.autograd.grad(outputs, inputs, towards)])
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
                assert (found != expected).float().mean() < 1e-2
    assert counters["stats"]["unique_graphs"] == tried, "compiled again"


@on_both
@pytest.mark.parametrize("policy", MEMORY_POLICIES)
def test_a_decoder_is_compiled_when_it_is_made(policy: str, device: str) -> None:
    """Steps compile nothing, and what they compute is no further from fp64."""
    exact = small_decoder("llama", register())
    plain, ours = half_decoder("llama", device), half_decoder("llama", device)
    exact.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
    try_out(ours)
    fuse_modules(ours)
    tried = counters["stats"]["unique_graphs"]
    output_of(ours, LENGTHS, is_learned=False)  # as the first layer's, while its weights are
    apply_policy(ours.layers, policy)
    for lengths in (LENGTHS, [40], [2, 30]):
        wanted = gradient_and_output(exact, lengths)
        errors = [
            [(x.cpu() - right).norm() for x, right in zip(found, wanted, strict=True)]
            for found in (gradient_and_output(decoder, lengths) for decoder in (plain, ours))
        ]
        assert all(our <= 1.2 * their for their, our in zip(*errors, strict=True)), errors
        assert counters["stats"]["unique_graphs"] == tried


def half_decoder(family: str, device: str) -> Any:
    """Return a random decoder in bf16, its norms random too."""
    decoder = small_decoder(family, register()).to(device, torch.bfloat16)
    for module in (*decoder.layers, decoder.norm, decoder.rotary_emb):
        del module.forward  # which would compute in fp64
    for name, parameter in decoder.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    return decoder


def own_and_fused(
    module: Any, decoder: Any
) -> Iterator[tuple[Callable[..., Any], Callable[..., Any], list[tuple[int, ...]]]]:
    """Yield what a module computes, what is fused in its place, and a token's inputs' sizes."""
    if fused._is_norm(module):
        width = len(module.weight)
        size = (width,) if width == HIDDEN_SIZE else (4, width)
        yield (
            lambda x: (type(module).forward(module, x),),
            lambda x: (fused._normed(module, x),),
            [size],
        )
    elif (rotary := fused._rotary_of(module)) is not None:
        head = module.head_dim

        def angles(tokens: int) -> Any:
            return decoder.rotary_emb(
                next(decoder.parameters()), torch.arange(tokens, device=decoder.device)[None]
            )

        def rotated(function: Callable[..., Any], query: Tensor, key: Tensor) -> Any:
            heads = [x.view(1, x.shape[1], -1, head).transpose(1, 2) for x in (query, key)]
            return function(*heads, *angles(query.shape[1]))

        yield (
            lambda *heads: rotated(rotary, *heads),
            lambda *heads: rotated(lambda *args: fused._rotated(rotary, *args), *heads),
            [(4 * head,), (2 * head,)],
        )
    elif fused._is_gated(module):
        act = module.act_fn
        yield (
            lambda gate, up: (act(gate) * up,),
            lambda gate, up: (compiled(fused._product)(act, gate, up),),
            [(48,), (48,)],
        )
