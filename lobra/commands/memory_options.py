"""The options that choose a memory policy, of `lobra train` and `lobra profile memory`."""

from __future__ import annotations

import argparse

from lobra.common.errors import ConfigError
from lobra.layout.layout import MEMORY_POLICIES, Layout


def add_memory_options(parser: argparse.ArgumentParser, default: str | None, whose: str) -> None:
    """Add ``--memory`` and ``--gradient-checkpointing``, another name of ``--memory full``."""
    options = parser.add_mutually_exclusive_group()
    options.add_argument(
        "--memory",
        choices=MEMORY_POLICIES,
        default=default,
        help="what is kept of a layer for the backward pass: all of it, or (full) only its input, "
        f"from which it is computed again; {whose}; lean is not built yet",
    )
    options.add_argument(
        "--gradient-checkpointing",
        action="store_const",
        const="full",
        dest="memory",
        default=default,
        help="the same as --memory full",
    )


def memory_problems(policy: str | None) -> list[str]:
    """Return why there are no replicas under this policy yet (empty: there are)."""
    try:
        Layout(1, 1, memory=policy or "keep")
    except ConfigError as error:
        return [f"--{problem.removeprefix('layout: ')}" for problem in error.problems]
    return []
