from __future__ import annotations

import pickle

import pytest

from tasks.errors import ConfigError, did_you_mean, first_problems


def test_one_problem_is_shown_as_it_is() -> None:
    error = ConfigError("a.json: rank = -1: want a positive integer")
    assert error.problems == (str(error),) == ("a.json: rank = -1: want a positive integer",)


def test_several_problems_are_numbered() -> None:
    lines = str(ConfigError(["first", "second"])).splitlines()
    assert lines[1].endswith("1. first") and lines[2].endswith("2. second")


def test_survives_the_way_between_processes() -> None:
    again = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert again.problems == ("a", "b")


def test_an_error_without_a_problem_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        ConfigError([])


def test_long_lists_end_with_a_count() -> None:
    assert first_problems(map(str, range(20))) == [str(i) for i in range(20)]
    shown = first_problems(map(str, range(25)))
    assert shown[:20] == [str(i) for i in range(20)] and "5 more" in shown[20]
    assert len(shown) == 21


def test_suggestions_ignore_case_and_leave_strangers_alone() -> None:
    assert "'rank'" in did_you_mean("Ramk", ["rank", "steps"])
    assert did_you_mean("zzz", ["rank", "steps"]) == ""
