from __future__ import annotations

import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.errors import (
    KINDS_COUNTED,
    LINES_IN_FULL,
    MOST_CHARACTERS,
    MOST_LINES,
    ConfigError,
    Problems,
    did_you_mean,
)


def test_one_problem_is_shown_as_it_is() -> None:
    error = ConfigError("a.json: rank = -1: want a positive integer")
    assert list(error.problems) == [str(error)] == ["a.json: rank = -1: want a positive integer"]


def test_several_problems_are_numbered() -> None:
    lines = str(ConfigError(["first", "second"])).splitlines()
    assert lines[1].endswith("1. first") and lines[2].endswith("2. second")


def bad_rows(path: str, count: int) -> list[str]:
    return [f"{path}: line {n + 1}: output = {n}: want a text" for n in range(count)]


def test_survives_the_way_between_processes() -> None:
    error = ConfigError(["a", "b", *bad_rows("x.jsonl", 100)])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.problems.total == 102


def test_an_error_without_a_problem_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        ConfigError([])


@pytest.mark.parametrize("count", [2, MOST_LINES, MOST_LINES + 1, 600])
def test_no_more_than_twenty_lines_of_mistakes(count: int) -> None:
    header, *lines = str(ConfigError(bad_rows("data/a.jsonl", count))).splitlines()
    assert header == f"{count} problems:"
    assert len(lines) <= MOST_LINES
    if count <= MOST_LINES:
        assert len(lines) == count
        return
    assert lines[0] == "  1. data/a.jsonl: line 1: output = 0: want a text"
    rest = count - LINES_IN_FULL
    assert lines[LINES_IN_FULL:] == [
        f"  and {rest} more:",
        f"  {rest} like: data/a.jsonl: line N: output = ...: want a text",
    ]


def test_many_mistakes_of_one_kind_do_not_hide_others() -> None:
    found = Problems(bad_rows("a.jsonl", 600))
    found += bad_rows("b.jsonl", 100)
    found.add("plan.yaml: dp is missing")
    assert found.total == 701
    for shown in ("a.jsonl: line 1:", "b.jsonl: line 1:", "plan.yaml: dp"):
        assert any(problem.startswith(shown) for problem in found)
    assert sum(count for _, count in found.counts) + len(found) == 701


def test_values_do_not_make_kinds() -> None:
    texts = ['"a: b"', '"say \\"x\\""', "'it'", "[1, 2]", '{"k": 1}', "true", '"cut off: no...']
    found = Problems(
        f"the task's file: task[{n}].rank = {text}: want a positive integer{hint}"
        for text in texts
        for hint in (" (did you mean 'a'?)", " (did you mean 'b'?)")
        for n in range(5)
    )
    kinds = {kind for kind, _ in found.counts}
    assert kinds == {
        "the task's file: task[N].rank = ...: want a positive integer (did you mean ...?)"
    }


def test_a_prefix_reaches_what_is_only_counted() -> None:
    found = Problems(bad_rows("a.jsonl", 50)).prefixed("c.json: task[3]: ")
    assert found.total == 50
    assert all(problem.startswith("c.json: task[3]: a.jsonl") for problem in found)
    assert found.counts[0][0].startswith("c.json: task[N]: a.jsonl: line N")


def test_a_million_different_mistakes_need_little_memory() -> None:
    tracemalloc.start()
    found = Problems(f"{'abcdefghij'[n % 10] * (n % 700)} is bad" for n in range(20_000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.total == 20_000
    assert peak < 1_000_000
    assert len(str(found).splitlines()) <= MOST_LINES + 1
    assert len(found._rest) <= KINDS_COUNTED + 1


PRINTABLE = st.characters(codec="utf-8").filter(str.isprintable)


@given(st.lists(st.lists(st.text(PRINTABLE, max_size=8), max_size=40), max_size=6))
def test_merging_keeps_count_and_bound(parts: list[list[str]]) -> None:
    found = Problems()
    for part in parts:
        found += Problems(part)
    assert found.total == sum(map(len, parts))
    assert len(found) + sum(count for _, count in found.counts) == found.total
    assert len(found) + bool(found.counts) + len(found.counts) <= MOST_LINES
    every = [problem for part in parts for problem in part]
    assert len(every) > MOST_LINES or list(found) == every


@given(st.text(min_size=1))
def test_a_mistake_is_one_line_that_no_terminal_obeys(text: str) -> None:
    (problem,) = Problems([text])
    assert problem.isprintable()
    (problem,) = Problems(["task[0].name = " + text * 5000 + ": want another"])
    assert len(problem) < 10 * MOST_CHARACTERS
    assert problem.startswith("task[0].name") and problem.endswith(": want another")


def test_raising_only_what_is_there() -> None:
    Problems().raise_if_any()
    with pytest.raises(ConfigError, match="bad"):
        Problems(["bad"]).raise_if_any()


def test_what_fails_by_a_mistake_is_none_and_noted() -> None:
    problems = Problems(["first"])

    def fail(text: str) -> str:
        raise ConfigError([text, "third"])

    assert problems.result_of(str.upper, "a") == "A"
    assert problems.result_of(fail, "second") is None
    assert list(problems) == ["first", "second", "third"]


def test_suggestions_ignore_case_and_leave_strangers_alone() -> None:
    assert "'rank'" in did_you_mean("Ramk", ["rank", "steps"])
    assert did_you_mean("zzz", ["rank", "steps"]) == ""


def test_what_two_things_stumble_over_is_noted_once() -> None:
    found = Problems(["model 'x': none"])
    with found.noted():
        raise ConfigError(["model 'x': none", "a.csv: broken"])
    with found.noted():
        raise ConfigError(Problems(bad_rows("b.jsonl", 30)))
    assert found.total == 32 and list(found)[:2] == ["model 'x': none", "a.csv: broken"]
