"""How much a measurement of times may cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """How often a function is run to time it.

    Attributes
    ----------
    timed_s
        Seconds of all repeats together, where the fewest and 30 repeats allow it.
    least, least_of_mixture
        The fewest repeats of a function, and of each where there are several.
    attempts
        How often a row is measured at most: again if it sticks out.
    """

    timed_s: float
    least: int
    least_of_mixture: int
    attempts: int


THOROUGH = Effort(timed_s=0.8, least=3, least_of_mixture=2, attempts=3)
#: For a first look: half the shapes (`grid.time_grid`), each run a third as often.
QUICK = Effort(timed_s=0.2, least=2, least_of_mixture=1, attempts=1)
