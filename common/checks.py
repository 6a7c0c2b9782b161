"""Checks of single values a person wrote into a file, and how to show such a value."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lobra.common.errors import did_you_mean

#: A check returns what is wanted if the value is wrong, otherwise None.
Check = Callable[[Any], str | None]


def integer(least: int) -> Check:
    """Return a check for integers of ``least`` and more; booleans are none."""
    wanted = "a positive integer" if least == 1 else f"an integer of {least} or more"

    def check(value: Any) -> str | None:
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return None if good else wanted

    return check


def number(accept: Callable[[float], bool], wanted: str) -> Check:
    """Return a check for finite numbers that ``accept`` takes; booleans are none."""

    def check(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return wanted
        return None if abs(value) <= sys.float_info.max and accept(value) else wanted

    return check


def one_of(choices: Sequence[str]) -> Check:
    """Return a check for one of some texts."""

    def check(value: Any) -> str | None:
        if value in choices:
            return None
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"one of {', '.join(choices)}{hint}"

    return check


def text(value: Any) -> str | None:
    """Check for a text that is not blank."""
    return None if isinstance(value, str) and value.strip() else "a text that is not empty"


def text_or_texts(value: Any) -> str | None:
    """Check for a text that is not blank, or a list of at least one."""
    each = value if isinstance(value, list) and value else [value]
    return None if not any(map(text, each)) else "a text that is not empty, or a list of such texts"


def boolean(value: Any) -> str | None:
    """Check for true or false."""
    return None if isinstance(value, bool) else "true or false"


_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}")


def safe_name(value: Any) -> str | None:
    """Check for a text that can be a folder's name on every system."""
    if isinstance(value, str) and _SAFE_NAME.fullmatch(value):
        return None
    return (
        "a name of at most 100 letters, digits and ._+- that starts with a letter, digit or _ "
        "(it becomes a folder)"
    )


def show(value: Any) -> str:
    """Return a value as the file spells it, cut to a line's length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
