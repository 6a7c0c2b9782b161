"""Schedules are transformers' and clipping is torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from lobra.trainer.schedule import clip_coefficient, learning_rate
from tests.trainer.support import small_task


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 12), st.integers(1, 30))
def test_schedules_equal_transformers(name: str, warm_up: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warm_up,
        num_training_steps=steps,
    )
    config = small_task(lr_scheduler=name, warmup_steps=warm_up)
    for step in range(steps):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate(config, step, steps) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        theirs.step()


@given(st.floats(0.01, 100), st.floats(0.01, 10))
def test_clipping_equals_torch(scale: float, max_norm: float) -> None:
    parameter = torch.zeros(5, requires_grad=True)
    parameter.grad = torch.linspace(-1, 2, 5) * scale
    gradient = parameter.grad.clone()
    norm = float(gradient.norm())
    torch.nn.utils.clip_grad_norm_([parameter], max_norm)
    torch.testing.assert_close(gradient * clip_coefficient(norm, max_norm), parameter.grad)


def test_no_clipping_at_zero() -> None:
    assert clip_coefficient(1e9, 0.0) == 1.0
