from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.planner.bucketed.problem import Problem
from lobra.planner.bucketed.whole_micro_batches import WholeMicroBatches
from tests.planner.strategies import problems
from tests.planner.support import best_dispatch_s
from tests.tiers import examples


@given(st.data(), problems(("fitted",)))
@examples(50, 1000)
def test_whole_micro_batches_never_exclude_a_plan_that_reaches_the_step_time(
    data: st.DataObject, problem: Problem
) -> None:
    longest = int(problem.buckets[-1])
    holds = [i for i, c in enumerate(problem.candidates) if c.max_tokens >= longest]
    replicas = np.zeros(len(problem.candidates), dtype=np.int64)
    replicas[data.draw(st.sampled_from(holds), label="the one that holds all")] += 1
    replicas[data.draw(st.integers(0, len(replicas) - 1), label="another")] += 1
    tables = list(problem.tables)
    every = [tables[i] for i in np.repeat(np.arange(len(replicas)), replicas)]
    step_s = best_dispatch_s(every, problem.counts) * (1 + 1e-9)
    whole = WholeMicroBatches(tables, problem.counts, step_s)
    layouts = np.flatnonzero(replicas)
    value = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
    worths = st.lists(value, min_size=len(layouts), max_size=len(layouts))
    for worth in data.draw(st.lists(worths, min_size=5, max_size=10), label="values"):
        values = np.zeros(len(replicas))
        values[layouts] = worth
        nothing = np.zeros(len(problem.counts))
        assert whole.needed(values, nothing, layouts) <= values @ replicas + 1e-9
