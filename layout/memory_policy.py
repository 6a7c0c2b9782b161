"""The option that chooses a memory policy."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from lobra.common.errors import ConfigError
from lobra.layout.layout import MEMORY_POLICIES, Layout


def built(policy: str) -> str | None:
    """Check for a policy that there are replicas of."""

    def is_built(policy: str) -> bool:
        try:
            Layout(1, 1, memory=policy)
        except ConfigError:
            return False
        return True

    if is_built(policy):
        return None
    return f"{' or '.join(filter(is_built, MEMORY_POLICIES))}, {policy} is not built yet"


MemoryPolicy = Annotated[
    Literal["keep", "lean", "full"],
    built,
    Parameter(
        help="What every replica keeps of a layer for the backward pass: all of it, or (full) only "
        "its input, from which it is computed again (--gradient-checkpointing: the same as full); "
        "lean is not built yet."
    ),
]
