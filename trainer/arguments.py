"""The arguments of a command that is given again: from where it goes on, and on which plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lobra.layout.layout import MEMORY_POLICIES


def with_resume(arguments: Sequence[str], step: int | None) -> list[str]:
    """Return arguments with `--resume step` for what they say of it, if any; None: as they are."""
    if step is None:
        return list(arguments)
    return [*without_option(arguments, "--resume", str.isdigit), "--resume", str(step)]


def on_plan(arguments: Sequence[str], plan: Path | None) -> list[str]:
    """Return arguments with another plan, which says itself what is kept; None: as they are."""
    if plan is None:
        return list(arguments)
    for option in ("--memory", "--gradient-checkpointing"):
        arguments = without_option(arguments, option, MEMORY_POLICIES.__contains__)
    return [*arguments, "--strategy-config", str(plan)]  # the last one counts


def without_option(
    arguments: Sequence[str], name: str, is_value: Callable[[str], bool] = lambda _: True
) -> list[str]:
    """Return arguments without an option and what follows it as its value."""
    return [
        word
        for word, before in zip(arguments, ["", *arguments], strict=False)
        if word.partition("=")[0] != name and not (before == name and is_value(word))
    ]
