"""A layer that keeps less computes the same, no product more often than its policy says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, LlamaConfig

from lobra.layout.layout import ADAPTER_HIDDEN, ATTENTION, COMPUTED_AGAIN, MEMORY_POLICIES
from lobra.model import packed_attention
from lobra.model.memory_policy import LAST_PRODUCT, apply_policy, kept
from lobra.model.packed_attention import Packing, register
from tests.model.alive import Alive
from tests.model.decoders import HIDDEN_SIZE, small_decoder
from tests.model.support import FAMILIES

LENGTHS = [5, 1, 9]


class AdaptedProduct(torch.autograd.Function):
    """x W' + x A' B', which adds A's and B's gradients into buffers as a side effect."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear) -> Tensor:
        ctx.linear = linear

        def x_times_A() -> Tensor:
            linear.products[ADAPTER_HIDDEN] += 1
            return x @ linear.A.T

        hidden = kept(ADAPTER_HIDDEN, x_times_A)
        ctx.save_for_backward(x, hidden)

        def product() -> Tensor:
            linear.products[linear.name] += 1
            output = x @ linear.weight.T + hidden @ linear.B.T
            return output if linear.bias is None else output.add_(linear.bias)

        return kept(linear.name, product)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x, hidden), linear = ctx.saved_tensors, ctx.linear
        towards_hidden = gradient @ linear.B
        linear.gradient_B += gradient[0].T @ hidden[0]
        linear.gradient_A += towards_hidden[0].T @ x[0]
        return gradient @ linear.weight + towards_hidden @ linear.A, None


class HalvedInPlace(torch.autograd.Function):
    """Stands for the sum over a tensor-parallel group, which overwrites what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear) -> Tensor:
        def halved() -> Tensor:
            linear.products[f"{linear.name} halved"] += 1
            return x.mul_(0.5)

        output = kept(linear.name, halved)
        if output is x:
            ctx.mark_dirty(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * 0.5, None


class AdaptedLinear(nn.Module):
    """A frozen linear with an adapter of rank 2 that counts its products."""

    def __init__(self, frozen: nn.Linear, name: str, products: Counter[str]) -> None:
        super().__init__()
        self.weight, self.bias = frozen.weight, frozen.bias
        self.name, self.products = name, products
        self.A = torch.randn(2, frozen.in_features).to(frozen.weight)
        self.B = torch.randn(frozen.out_features, 2).to(frozen.weight)
        self.gradient_A, self.gradient_B = torch.zeros_like(self.A), torch.zeros_like(self.B)

    def forward(self, x: Tensor) -> Tensor:
        output = AdaptedProduct.apply(x, self)
        is_summed = self.name in ("o_proj", "down_proj")
        return HalvedInPlace.apply(output, self) if is_summed else output


def adapt(model: nn.Module) -> tuple[dict[str, AdaptedLinear], Counter[str]]:
    """Give every linear an adapter; return them, and how often each product will be computed."""
    products: Counter[str] = Counter()
    linears = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            linears[path] = AdaptedLinear(module, name, products)
            setattr(model.get_submodule(parent), name, linears[path])
    return linears, products


class Counted(TorchDispatchMode):
    """Counts the attentions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.attentions += "attention" in func.name() and "backward" not in func.name()
        return func(*args, **(kwargs or {}))


def run(family: str, policy: str | None) -> tuple[list[Tensor], Counter[str]]:
    """Return output and gradients of both passes, and how often what was computed."""
    model = small_decoder(family, register())
    linears, products = adapt(model)
    if policy is not None:
        apply_policy(model.layers, policy)
    generator = torch.Generator().manual_seed(1)
    embedded = torch.randn(1, sum(LENGTHS), HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    embedded.requires_grad_()
    with Counted() as counted:
        output = model(
            inputs_embeds=embedded,
            position_ids=torch.cat([torch.arange(length) for length in LENGTHS])[None],
            attention_mask=None,
            use_cache=False,
            packing=Packing.of_lengths(LENGTHS),
        ).last_hidden_state
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
    products[ATTENTION] = counted.attentions
    gradients = [x for linear in linears.values() for x in (linear.gradient_A, linear.gradient_B)]
    assert embedded.grad is not None
    return [output.detach(), embedded.grad, *gradients], products


@pytest.mark.parametrize("policy", MEMORY_POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_is_computed_and_no_product_too_often(family: str, policy: str) -> None:
    expected, once = run(family, None)
    found, products = run(family, policy)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert products == {
        name: number * (2 if name.removesuffix(" halved") in COMPUTED_AGAIN[policy] else 1)
        for name, number in once.items()
    }
    # Capped scores are no operation of torch's own, and are always computed again.
    attentions = 0 if family == "gemma2" else 2 * len(LENGTHS)
    assert (once[LAST_PRODUCT], once[ATTENTION]) == (2, attentions)


@pytest.mark.parametrize(
    ("policy", "expected"), [("keep", 94_000), ("lean", 36_700), ("full", 8_200)]
)
def test_bytes_kept_of_an_8b_layer(
    monkeypatch: pytest.MonkeyPatch, policy: str, expected: int
) -> None:
    """Bytes a token and layer, of Llama 3.1 8B in bf16, by torch's attention for CUDA."""
    monkeypatch.setattr(packed_attention, "_is_fast", lambda query: True)
    length, kept_bytes = 1024, []
    for num_layers in (1, 3):
        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=num_layers,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=8,
        )
        with torch.device("meta"):
            model = AutoModel.from_config(
                config, attn_implementation=register(), dtype=torch.bfloat16
            )
            adapt(model.requires_grad_(False))
            apply_policy(model.layers, policy)
            embedded = torch.empty(1, length, 4096, dtype=torch.bfloat16, requires_grad=True)
            with Alive() as alive:
                output = model(
                    inputs_embeds=embedded,
                    position_ids=torch.zeros(1, length, dtype=torch.int64),
                    attention_mask=None,
                    use_cache=False,
                    packing=Packing((length,), torch.zeros(2, dtype=torch.int32)),
                )
                kept_bytes.append(alive.num_bytes())
        assert output.last_hidden_state.requires_grad
    assert (kept_bytes[1] - kept_bytes[0]) / 2 / length == pytest.approx(expected, rel=0.01)
