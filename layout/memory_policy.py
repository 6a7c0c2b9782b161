"""The option that chooses a memory policy."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from lobra.common.models import Wanted
from lobra.common.options import Within

# Lean has a name in files already, and no replicas yet.
BUILT = Annotated[Literal["keep", "full"], Wanted("keep or full, lean is not built yet")]

MemoryPolicy = Annotated[
    Literal["keep", "lean", "full"],
    Within(BUILT),
    Parameter(
        help="What every replica keeps of a layer for the backward pass: all of it, or (full) only "
        "its input, from which it is computed again (--gradient-checkpointing: the same as full); "
        "lean is not built yet."
    ),
]
