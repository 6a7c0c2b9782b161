"""Finding the largest size that fits, with as few trials as possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """What trying one size gave.

    Attributes
    ----------
    size
        What was tried (tokens).
    fits
        Whether it fits.
    peak_bytes
        The memory it took at its peak, None when the trial died before it could say.
    reason
        Why it does not fit, "" if it does.
    """

    size: int
    fits: bool
    peak_bytes: int | None = None
    reason: str = ""


def largest_fitting(
    trial: Callable[[int], Trial], step: int, largest: int, budget_bytes: int | None = None
) -> tuple[int, tuple[Trial, ...]]:
    """Return the largest multiple of ``step`` up to ``largest`` that fits (0: none) and the trials.

    Bisection between a size that fits and one that does not. Where two trials gave their peak
    memory, the next guess is where the straight line through them meets the budget (memory grows
    about linearly in tokens), kept inside the bracket. After three such guesses in a row the
    bracket is halved, so that there are never more than about twice the trials of bisection.

    Parameters
    ----------
    trial
        Tries a size; it must fit whenever a larger one does.
    step, largest
        In tokens; ``largest`` is rounded down to a multiple of ``step``.
    budget_bytes
        What the peak is compared with; without it the bracket is always halved.

    Raises
    ------
    ValueError
        If ``step`` is not positive or ``largest`` is less than ``step``.
    """
    if step < 1 or largest < step:
        raise ValueError(f"no multiple of {step} up to {largest}")
    trials: list[Trial] = []
    fits, fails = 0, largest // step + 1  # in steps; `fails` is known or assumed not to fit
    guess, guesses_in_a_row = largest // step, 0
    while fails - fits > 1:
        outcome = trial(guess * step)
        trials.append(outcome)
        if outcome.fits:
            fits = guess
        else:
            fails = guess
        predicted = _predicted_steps(trials, step, budget_bytes) if guesses_in_a_row < 3 else None
        if predicted is None:
            guess, guesses_in_a_row = (fits + fails) // 2, 0
        else:
            guess, guesses_in_a_row = predicted, guesses_in_a_row + 1
        guess = min(max(guess, fits + 1), fails - 1)
    return fits * step, tuple(trials)


def _predicted_steps(trials: list[Trial], step: int, budget_bytes: int | None) -> int | None:
    """Return how many steps the budget holds by the line through the two trials nearest to it."""
    known = [(t.size, t.peak_bytes) for t in trials if t.peak_bytes is not None]
    if budget_bytes is None or len(known) < 2:
        return None
    known.sort(key=lambda point: abs(point[1] - budget_bytes))
    (size_a, peak_a), (size_b, peak_b) = known[:2]
    if size_a == size_b or peak_a == peak_b:
        return None
    slope = (peak_b - peak_a) / (size_b - size_a)
    if slope <= 0:
        return None
    return int((size_a + (budget_bytes - peak_a) / slope) // step)
