"""Cost models, plans, lengths and planning problems; a failing one shrinks to a small one.

Numbers are drawn as integers of a unit: they shrink to ones a person can calculate with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.bucketed.problem import Problem
from lobra.planner.candidates import Candidate
from tests.planner.support import LawCostModel

LAYOUTS = tuple(Layout(tp, pp) for tp, pp in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1)))
KINDS = ("fitted", "lobra6")
SHORT_TOKENS = 256  # half of all sequences are at most this long


@st.composite
def cost_models(draw: st.DrawFn, kinds: Sequence[str] = ("fitted",)) -> LawCostModel:
    """Times that grow with b and s and shrink, less than proportionally, with tp."""
    kind = draw(st.sampled_from(kinds))
    laws = {}
    for tp in (1, 2, 4):
        speed = tp ** (draw(st.integers(50, 95)) / 100)
        constant = draw(st.integers(50, 400)) / 100
        per_token = draw(st.integers(200, 800)) / 100_000 / speed
        quadratic = draw(st.integers(0, 40)) * 1e-8 / speed
        bend = draw(st.integers(0, 400)) / 100_000 / speed if kind == "fitted" else 0.0
        laws[tp] = (constant, 0.05, per_token, quadratic, bend)
    return LawCostModel(8, laws, kind)


@st.composite
def plans(
    draw: st.DrawFn,
    layouts: Sequence[Layout] = LAYOUTS,
    most_replicas: int = 4,
    most_tokens: int = 4096,
) -> Plan:
    """One to three groups of replicas, each of another layout and with its own capacity."""
    groups = st.builds(
        ReplicaGroup,
        st.sampled_from(layouts),
        st.integers(1, most_replicas),
        st.integers(64, most_tokens),
    )
    by_layout = st.lists(groups, min_size=1, max_size=3, unique_by=lambda group: group.layout)
    return make_plan(draw(by_layout))


@st.composite
def lengths(draw: st.DrawFn, longest: int, most: int, least: int = 1) -> list[int]:
    """Lengths of ``least`` to ``most`` sequences with a heavy tail: half of them are short."""
    length = st.integers(1, min(SHORT_TOKENS, longest)) | st.integers(1, longest)
    number = draw(st.integers(least, most))
    return draw(st.lists(length, min_size=number, max_size=number))


@st.composite
def steps(
    draw: st.DrawFn, most: int, least: int = 1, most_replicas: int = 4
) -> tuple[Plan, list[int]]:
    """A plan, and the lengths of a step's sequences that it holds."""
    plan = draw(plans(most_replicas=most_replicas))
    longest = plan.max_tokens // 16 * 16  # as far as buckets, multiples of 16, go
    return plan, draw(lengths(longest, most, least))


@st.composite
def problems(
    draw: st.DrawFn, kinds: Sequence[str] = KINDS, max_gpus: int = 4, max_count: int = 4
) -> Problem:
    """A problem of at most three buckets whose longest sequence fits some layout."""
    num_gpus = draw(st.integers(1, max_gpus))
    units = draw(st.lists(st.integers(1, 29), min_size=1, max_size=3, unique=True))
    buckets = np.sort(units) * 64
    counts = np.array([draw(st.integers(0, max_count)) for _ in units[1:]] + [1], dtype=np.int64)
    counts[-1] = draw(st.integers(1, max_count))
    usable = [layout for layout in LAYOUTS if layout.num_gpus <= num_gpus]
    chosen = draw(st.lists(st.sampled_from(usable), min_size=1, unique=True))
    capacity = {tp: draw(st.integers(256, 2047)) for tp in sorted({c.tp for c in chosen})}
    candidates = [Candidate(layout, capacity[layout.tp]) for layout in chosen]
    longest = int(buckets[-1])
    if max(candidate.max_tokens for candidate in candidates) < longest:
        more = draw(st.integers(0, 899))
        candidates[-1] = Candidate(candidates[-1].layout, longest + more)
    cost_model = draw(cost_models(kinds))
    return Problem(counts, buckets, tuple(sorted(candidates)), num_gpus, cost_model, num_gpus)


@st.composite
def replicas_of(draw: st.DrawFn, problem: Problem) -> np.ndarray:
    """Replicas of each candidate, within the GPUs; some replica holds the longest bucket."""
    longest = int(problem.buckets[-1])
    holds = [i for i, c in enumerate(problem.candidates) if c.max_tokens >= longest]
    replicas = np.zeros(len(problem.candidates), dtype=np.int64)
    first = draw(st.sampled_from(holds))
    order = [first, *(i for i in range(len(replicas)) if i != first)]
    left = problem.num_gpus
    for index in order:
        size = int(problem.sizes[index])
        replicas[index] = draw(st.integers(int(index == first), left // size))
        left -= int(replicas[index]) * size
    return replicas
