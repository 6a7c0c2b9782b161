"""Products in eight bits of floating point: what is rounded, and that torch's own agrees."""

from __future__ import annotations

import pytest
import torch

from lobra.common.errors import ConfigError
from lobra.layout.base_precision import QUANTISED, plan_problem, takes_more
from lobra.layout.shapes import NAMED_SHAPES
from lobra.model.fp8_linear import Fp8Linear, rounded
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_time import Workload, layer_ms
from lobra.profiler.hardware import product_problem
from tests.model.quantised import in_e4m3

TOKENS, INPUTS, OUTPUTS = 48, 96, 64


def rows(number: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 4, number)[:, None]
    values = torch.randn(number, INPUTS, generator=generator) * sizes
    values[3] = 0.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_rounded_as_the_format_is_defined(dtype: torch.dtype) -> None:
    values, scales = rounded(rows(TOKENS, dtype=dtype))
    assert values.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    expected = in_e4m3(rows(TOKENS, dtype=dtype).double())
    assert torch.equal(values.double() * scales, expected)
    assert torch.equal(values.to(dtype) * scales.to(dtype), expected.to(dtype)), "exact in bf16 too"


def test_a_value_does_not_depend_on_the_others_of_its_row() -> None:
    """So a shard of a row, whose largest value is another, has the values of the whole."""
    x = rows(TOKENS)
    x[:, INPUTS // 2 :] *= 100
    is_small = (x.abs() < x.abs().amax(1, keepdim=True) / 2**12)[:, : INPUTS // 2]
    whole, part = (
        values.float() * scales for values, scales in map(rounded, (x, x.chunk(2, 1)[0]))
    )
    different = whole[:, : INPUTS // 2] != part
    assert not (different & ~is_small).any() and not is_small.all()


def linear(dtype: torch.dtype, bias: torch.Tensor | None = None, device: str = "cpu") -> Fp8Linear:
    return Fp8Linear(*rounded(rows(OUTPUTS, seed=1).to(device)), dtype, bias)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_is_that_of_torch(device: str) -> None:
    """On a CPU torch computes what its kernels for GPUs are asked for.

    GPUs sum products in eight bits with about 14 bits (DeepSeek-V3, arXiv 2412.19437), so what they
    are off by is a share of the products' sizes, not of their sum's.
    """
    x = rows(TOKENS, dtype=torch.bfloat16).unflatten(0, (4, -1))
    own = linear(torch.bfloat16, device=device)
    factors = in_e4m3(x.flatten(0, 1).double()), own.weight_oi().double().t().cpu()
    exact, sizes = factors[0] @ factors[1], factors[0].abs() @ factors[1].abs()
    for product in (own.scaled_product(x.to(device)), own.product(x.to(device))):
        assert product.shape == (*x.shape[:-1], OUTPUTS) and product.dtype == torch.bfloat16
        found = product.flatten(0, 1).double().cpu()
        share = 2**-11 if device == "cuda" else 0.0
        assert ((found - exact).abs() <= 2**-7 * exact.abs() + share * sizes + 1e-9).all()
        assert not product._is_view(), "adapters add to it in place"


def test_gradients_are_by_the_weight_as_it_is_made_again() -> None:
    bias = torch.arange(OUTPUTS).double()
    own = linear(torch.float64, bias)
    x = rows(TOKENS, dtype=torch.float64).unflatten(0, (4, -1))
    weight = in_e4m3(rows(OUTPUTS, seed=1).double())
    assert torch.equal(own.weight_oi(), weight)
    expected = in_e4m3(x.flatten(0, 1)).view(x.shape) @ weight.t() + bias
    torch.testing.assert_close(own(x), expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn(TOKENS, OUTPUTS, dtype=torch.float64)
    torch.testing.assert_close(own.input_gradient(dy, None), dy @ weight)


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    x = rows(TOKENS)
    x[5, 7] = torch.inf
    x[6, 7] = torch.nan
    y = linear(torch.float32).product(x)
    assert not y[5:7].isfinite().any() and y[:5].isfinite().all() and y[7:].isfinite().all()


def test_cards_without_such_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    for version, is_refused in (((8, 0), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda version=version: version)
        problem = product_problem("fp8", "cuda")
        assert (problem is not None) == is_refused
        assert problem is None or "NVIDIA A100 has no products in fp8" in problem
        assert product_problem("int8", "cuda") is product_problem("fp8", "cpu") is None
    tables = load_tables()
    shape = NAMED_SHAPES["7B"].kept_in("fp8")
    with pytest.raises(ConfigError, match="A100-40GB: has no products in fp8"):
        layer_ms(
            Workload(shape, tables.accelerator("A100-40GB"), "bf16", 16), tables.efficiency, 1, 1, 9
        )


def test_estimates_know_that_products_are_faster_and_gradients_are_not() -> None:
    tables = load_tables()
    plain_ms, int8_ms, fp8_ms = (
        float(layer_ms(
            Workload(NAMED_SHAPES["7B"].kept_in(kept), tables.accelerator("H100"), "bf16", 16),
            tables.efficiency, 1, 1, 8192,
        ))
        for kept in (None, "int8", "fp8")
    )  # fmt: skip
    assert 0.7 * plain_ms < fp8_ms < plain_ms < int8_ms


def test_plans_of_bases_of_one_size_are_each_other_s() -> None:
    assert QUANTISED == ("fp8", "int8", "nf4")
    for made_for in ("fp8", "int8"):
        for quantised in ("fp8", "int8", "nf4"):
            assert plan_problem(made_for, quantised) is None
        assert "in " + made_for in (plan_problem(made_for, None) or "")
    assert takes_more("fp8", "nf4") and not takes_more("fp8", "int8")
