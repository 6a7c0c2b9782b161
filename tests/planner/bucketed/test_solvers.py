from __future__ import annotations

from threading import Event
from time import process_time

import numpy as np
import pytest

from lobra.planner.bucketed import lobra
from lobra.planner.bucketed.identical import IdenticalModel
from lobra.planner.bucketed.solvers import Solvers
from lobra.planner.bucketed.time_table import time_table
from tests.planner.strategies import LAYOUTS
from tests.planner.support import plain_cost_model, small_problem


def hard_model() -> IdenticalModel:
    """A model that SCIP does not solve within minutes."""
    buckets = np.arange(1, 25) * 80
    counts = 50 + 61 * np.arange(len(buckets)) % 150
    tables = [
        time_table(layout, 2000 + 300 * i, buckets, plain_cost_model())
        for i, layout in enumerate(LAYOUTS)
    ]
    return IdenticalModel(tables, counts, num_gpus=40)


def test_an_interrupt_stops_the_solvers_at_once() -> None:
    started = Event()

    def build() -> IdenticalModel:
        started.set()
        return hard_model()

    def interrupted() -> None:
        with Solvers(1) as solvers:
            solvers.submit(build, None, None, 0.0)
            started.wait(20.0)
            begin.append(process_time())
            raise KeyboardInterrupt

    begin: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert process_time() - begin[0] < 10.0, "of the processor's time, all threads together"
    assert lobra.balance(small_problem()).proven


def test_a_solver_that_refuses_an_interrupt_is_asked_again() -> None:
    """SCIP does so while it sets up; what ends the block is still the interrupt."""
    asked: list[int] = []
    started, stopped = Event(), Event()

    class Model:
        def stop(self) -> None:
            asked.append(1)
            if len(asked) < 3:
                raise Exception("SCIP: method cannot be called at this time in solution process!")
            stopped.set()

        def solve(self, *_limits: float | None) -> None:
            started.set()
            stopped.wait(20.0)

    def interrupted() -> None:
        with Solvers(1) as solvers:
            solvers.submit(Model, None, None, 0.0)  # type: ignore[arg-type]
            started.wait(20.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(asked) == 3 and stopped.is_set()
