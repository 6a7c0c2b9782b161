"""What is left of a run, at a steady rate, is what the steps that are left then take."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.trainer.forecast import Forecast
from lobra.trainer.metrics import StepMetrics, TaskMetrics
from lobra.trainer.screen import describe, describe_tasks

NAMES = ("a", "b", "c")
positive = st.floats(0.1, 100.0)


def step(flops: dict[str, float], rate: float, predicted_rate: float = 1.0) -> StepMetrics:
    """Return a step of these tasks that takes a second for so many operations."""
    total = sum(flops.values())
    tasks = {
        name: TaskMetrics(2.5, 3, 1, 1.0, 0.1, applied=True, own_step=4, flops=own)
        for name, own in flops.items()
    }
    return StepMetrics(
        step=4, step_time_s=total / rate, predicted_step_time_s=total / predicted_rate,
        dispatch_time_s=0.0, dispatch_wait_s=0.0, prepare_time_s=0.0, replica_wait_s=0.0,
        reduce_time_s=0.0, optimizer_time_s=0.0, tokens=3, padded_tokens=3, gpu_seconds=1.0,
        memory_bytes=1, tasks=tasks, replicas=[], flops=total, tokens_per_s=1234.5,
    )  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(NAMES), st.tuples(positive, st.integers(0, 9)), min_size=1),
    positive, positive, st.integers(1, 5),
)  # fmt: skip
def test_what_is_left_at_a_steady_rate(
    tasks: dict[str, tuple[float, int]], rate: float, predicted_rate: float, num_steps: int
) -> None:
    forecast = Forecast()
    flops = {name: own for name, (own, _) in tasks.items()}
    for _ in range(num_steps):
        forecast.add(step(flops, rate, predicted_rate))
    outlook = forecast.outlook({name: (num_steps, left) for name, (_, left) in tasks.items()})
    to_come = [
        {name: own for name, (own, left) in tasks.items() if left > number} for number in range(9)
    ]
    seconds = [sum(own.values()) / rate for own in to_come]
    assert outlook.time_left_s == pytest.approx(sum(seconds))
    assert outlook.predicted_left_s == pytest.approx(sum(seconds) * rate / predicted_rate)
    for name, (_, left) in tasks.items():
        assert outlook.tasks[name].time_left_s == pytest.approx(sum(seconds[:left]))


def test_a_rate_is_that_of_the_last_steps() -> None:
    forecast = Forecast()
    for rate in (0.01, *[1.0] * 100, *[2.0] * 100):  # the first step is slow by itself
        forecast.add(step({"a": 10.0}, rate))
    assert forecast.outlook({"a": (201, 1)}).time_left_s == pytest.approx(5.0, rel=0.02)
    forecast = Forecast()
    for rate in (0.01, 1.0):
        forecast.add(step({"a": 10.0}, rate))
    assert forecast.outlook({"a": (2, 1)}).time_left_s == pytest.approx(10.0)


def test_a_step_and_what_is_left_in_words() -> None:
    forecast = Forecast()
    done = step({"a": 3.0, "b": 1.0}, 1.0)
    forecast.add(done)
    outlook = forecast.outlook({"a": (5, 1000), "b": (5, 0)})
    assert describe(done, outlook) == (
        "4.00 s (predicted 4.00)  1,234 tokens/s  0:50:00 left (predicted 0:50:00)"
    )
    assert describe_tasks(done, outlook) == (
        "a loss 2.500 (1,000 steps, 0:50:00 left); b loss 2.500 (its last step)"
    )
