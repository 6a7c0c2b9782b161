"""Schedules are transformers', clipping is torch's, and a skipped task is left exactly alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from lobra.tasks.config import TaskConfig
from lobra.trainer.optimizer import clip_coefficient, learning_rate, task_optimizer


def task(**fields: object) -> TaskConfig:
    values = dict(
        name="t", rank=2, lora_alpha=2.0, target_modules=("q_proj",), global_batch_size=1,
        dataset_name="d", context_length=8, learning_rate=0.3,
    )  # fmt: skip
    return TaskConfig(**{**values, **fields})  # type: ignore[arg-type]


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 12), st.integers(1, 30))
def test_schedules_equal_transformers(name: str, warm_up: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warm_up,
        num_training_steps=steps,
    )
    config = task(lr_scheduler=name, warmup_steps=warm_up)
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


def test_a_skipped_task_keeps_weights_and_moments() -> None:
    torch.manual_seed(0)
    both = [[torch.nn.Parameter(torch.randn(4))] for _ in range(2)]
    optimizer = task_optimizer([task(weight_decay=0.1), task(weight_decay=0.1)], both)
    for _ in range(2):
        for (parameter,) in both:
            parameter.grad = torch.randn(4)
        optimizer.step()
    kept = both[1][0].detach().clone()
    moments = {key: value.clone() for key, value in optimizer.state[both[1][0]].items()}
    optimizer.param_groups[1]["skip"] = True
    for (parameter,) in both:
        parameter.grad = torch.full((4,), float("nan") if parameter is both[1][0] else 1.0)
    before = both[0][0].detach().clone()
    optimizer.step()
    assert torch.equal(both[1][0], kept)
    for key, value in moments.items():
        assert torch.equal(optimizer.state[both[1][0]][key], value), key
    assert not torch.equal(both[0][0], before)
    assert torch.isfinite(both[0][0]).all()
