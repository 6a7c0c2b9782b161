"""What sequences cost on a candidate at least: what the certificate is given."""

from __future__ import annotations

from typing import Protocol

import numpy as np

MOST_BUBBLE = 0.8  # of the step: replicas with more are counted as if they had no more


class SequenceRates(Protocol):
    """What sequences of D lengths cost on one candidate at least: float64 [D] seconds each."""

    @property
    def least_s(self) -> np.ndarray:
        """Of a sequence among others, without bubble; infinite if it does not fit."""

    @property
    def alone_s(self) -> np.ndarray:
        """Of a replica that has nothing else, bubble included; infinite if it does not fit."""

    @property
    def unshared_s(self) -> np.ndarray:
        """Of a sequence that no other shares a micro-batch with, but those counted as 0."""

    @property
    def begun_s(self) -> np.ndarray:
        """Of a sequence, [limits, D]: by several ways to count what begins a micro-batch.

        No replica's time is less than the sum over its sequences, by any of them.
        """

    def after(self, step_s: float) -> tuple[np.ndarray, float]:
        """Of a sequence among others, and seconds of bubble, in steps of ``step_s`` or more.

        In t such seconds a replica has at most t less the bubble for sequences at these rates.
        """


def affine(
    rate_s: np.ndarray, from_s: np.ndarray, number: np.ndarray, step_s: float, weight: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return rates and seconds of bubble of steps of ``step_s`` or more, for `SequenceRates.after`.

    Of every length alone a replica does 0 before ``from_s``, which is at least ``step_s``, then
    ``number``, and later at most one more for each ``rate_s`` seconds; float64 [D] each. The
    ``weight`` of the lengths says for which mixture the bubble is chosen; it is valid for any.
    """
    fits = np.isfinite(rate_s)
    lost_s = np.full(len(rate_s), step_s)
    lost_s[fits] = from_s[fits] - number[fits] * rate_s[fits]
    typical_s = np.average(np.minimum(lost_s, step_s)[fits], weights=(weight * rate_s)[fits])
    bubble_s = min(float(typical_s), MOST_BUBBLE * step_s)
    left_s = step_s - bubble_s
    return rate_s * left_s / np.maximum(step_s - lost_s, left_s), bubble_s
