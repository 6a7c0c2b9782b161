"""Measured over predicted time becomes a replica's factor, and no single step decides."""

from __future__ import annotations

import pytest

from lobra.trainer.feedback import SpeedFeedback


def test_feedback_finds_the_factors_and_ignores_the_first_step() -> None:
    feedback = SpeedFeedback([1.0, 1.0, 1.0])
    feedback.update([1.0, 1.0, 1.0], [50.0, 50.0, 50.0])
    assert feedback.factors == [1.0, 1.0, 1.0]
    for _ in range(60):
        feedback.update([1.0, 2.0, 0.0], [3.0, 1.0, 0.0])
    # The third had no work: it approaches the middle of the others.
    assert feedback.factors == pytest.approx([3.0, 0.5, 1.5**0.5], rel=1e-2)


def test_one_hiccup_does_not_starve_a_replica() -> None:
    feedback = SpeedFeedback([1.0, 1.0], warm=True)
    feedback.update([1.0, 1.0], [60.0, 1.0])
    assert feedback.factors == pytest.approx([2.0, 1.0])
    feedback.factors[0] = 60.0
    for _ in range(80):
        feedback.update([0.0, 1.0], [0.0, 1.0])
    assert feedback.factors[0] < 1.1, "an idle replica is never tried again"
