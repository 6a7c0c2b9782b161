"""Patterns of the names of linears, as PEFT's rank_pattern has them: matched in bounded time."""

from __future__ import annotations

import re
from typing import Any

#: Of a name of 45 characters, four repetitions are tried in 200,000 ways; each more is 10 times it.
MOST_REPETITIONS = 4
_REPETITION = re.compile(r"[*+{]|(?<!\()\?")
_OF_A_GROUP = re.compile(r"\)[*+{]")


def pattern_problem(pattern: str) -> str | None:
    """Return why names are not matched with a pattern, None if they are."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{pattern!r} is no regular expression ({error})"
    if _OF_A_GROUP.search(pattern) or len(_REPETITION.findall(pattern)) > MOST_REPETITIONS:
        return (
            f"{pattern!r} may take for ever to match: want at most {MOST_REPETITIONS} of * + ? {{ "
            f"in it, and none behind a parenthesis but ?"
        )
    return None


def patterns_problem(patterns: Any) -> str | None:
    """Return what is wrong with numbers by patterns that a file of others has, None if nothing."""
    if not isinstance(patterns, dict) or not all(
        type(value) in (int, float) and value > 0 for value in patterns.values()
    ):
        return "want an object of positive numbers"
    return next(filter(None, map(pattern_problem, map(str, patterns))), None)
