from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.tasks.patterns import pattern_problem, patterns_problem
from tests.tiers import examples

NAME = "model.layers.31.self_attn.q_proj"
MOST_S = 2.0  # of processor time; two milliseconds is usual


@pytest.mark.parametrize(
    "pattern", ["q_proj", r"layers\.[01]\..*proj", r".*\.(0|1|2)\.(self_attn)?.+", r"\d{1,2}.*"]
)
def test_patterns_as_people_write_them(pattern: str) -> None:
    assert pattern_problem(pattern) is None


@pytest.mark.parametrize("pattern", ["(.*)*x", "(a+)+$", ".?" * 30 + "x", "(", "a{9999999999}"])
def test_what_may_take_for_ever_is_no_pattern(pattern: str) -> None:
    assert pattern_problem(pattern)


@examples(100, 1000)
@given(st.text(alphabet="q_.|()?*+{1,3}[^]\\$", max_size=20))
def test_what_is_taken_is_matched_soon(pattern: str) -> None:
    if pattern_problem(pattern) is None:
        begin = time.process_time()
        re.match(rf"(.*\.)?({pattern})$", NAME)
        assert time.process_time() - begin < MOST_S


@pytest.mark.parametrize("patterns", [7, [1], {"q_proj": "4"}, {"q_proj": -1}, {"(": 4}])
def test_patterns_of_another_file(patterns: object) -> None:
    assert patterns_problem(patterns)
    assert patterns_problem({"q_proj": 4}) is None
