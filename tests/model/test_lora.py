"""The adapted linear layer against finite differences and against its formula in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lobra.model.lora import Adapter, MultiAdapterLinear, RowTasks, Shard, row_segments

IN, OUT, RANK, LENGTH = 5, 7, 2, 3


def layer(row_tasks: list[int], dropout: float, with_bias: bool) -> MultiAdapterLinear:
    """Tasks 0 and 2 have adapters, task 1 has none; a task may have several segments."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    noise_seed = 11 if dropout else None
    linear = MultiAdapterLinear(
        draw(OUT, IN),
        draw(OUT) if with_bias else None,
        Shard(range(IN), range(OUT), IN, OUT),
        None,
        RowTasks(row_segments(row_tasks), noise_seed),
    )
    for task in (0, 2):
        A, B = torch.nn.Parameter(draw(RANK, IN)), torch.nn.Parameter(draw(OUT, RANK))
        linear.adapters[task] = Adapter(A, B, scaling=0.5 + task, dropout=dropout, key=task)
    return linear


def factors(linear: MultiAdapterLinear) -> list[torch.Tensor]:
    return [factor for adapter in linear.adapters.values() for factor in (adapter.A, adapter.B)]


@pytest.mark.parametrize("row_tasks", [[0, 0], [0, 1, 2, 2], [1, 2], [2, 0, 2]])
@pytest.mark.parametrize(("dropout", "with_bias"), [(0.0, True), (0.4, False)])
def test_gradients_are_those_of_finite_differences(
    row_tasks: list[int], dropout: float, with_bias: bool
) -> None:
    linear = layer(row_tasks, dropout, with_bias)
    x_BSi = torch.randn(len(row_tasks), LENGTH, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: linear(x), (x_BSi, *factors(linear)))


def test_the_formula_row_by_row() -> None:
    linear = layer([0, 1, 2, 2], 0.0, True)
    x_BSi = torch.randn(4, LENGTH, IN, dtype=torch.float64)
    for row, task in enumerate([0, 1, 2, 2]):
        expected = functional.linear(x_BSi[row], linear.weight, linear.bias)
        if (adapter := linear.adapters.get(task)) is not None:
            update = adapter.scaling * adapter.B @ adapter.A
            expected = expected + functional.linear(x_BSi[row], update)
        torch.testing.assert_close(linear(x_BSi)[row], expected)


def test_adapters_learn_where_the_input_needs_no_gradient() -> None:
    linear = layer([0, 2], 0.0, False)
    x_BSi = torch.randn(2, LENGTH, IN, dtype=torch.float64)
    linear(x_BSi).sum().backward()
    assert all(factor.grad is not None for factor in factors(linear))
    assert linear.weight.grad is None


def test_a_broken_adapter_harms_no_other_task() -> None:
    linear = layer([0, 2], 0.0, True)
    x_BSi = torch.randn(2, LENGTH, IN, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        linear.adapters[0].A.fill_(float("nan"))
    y_BSo = linear(x_BSi)
    y_BSo.sum().backward()
    assert x_BSi.grad is not None
    assert y_BSo[0].isnan().all()
    for value in (y_BSo[1], x_BSi.grad[1], linear.adapters[2].A.grad, linear.adapters[2].B.grad):
        assert value is not None
        assert value.isfinite().all()
