"""The 95 % interval of a mean, as every table of experiments and simulations has it."""

from __future__ import annotations

from collections.abc import Sequence

LEVEL = 0.95


def reach_of_mean(values: Sequence[float]) -> float:
    """Return half the width of the mean's interval (Student's); 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    import numpy as np
    from scipy.stats import t as student

    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
