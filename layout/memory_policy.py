"""The option that chooses a memory policy."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

MemoryPolicy = Annotated[
    Literal["keep", "lean", "full"],
    Parameter(
        help="What every replica keeps of a layer for the backward pass: what would be dear to "
        "compute again; (lean) that without the outputs of gate and up; or (full) only its input "
        "(--gradient-checkpointing: the same as full)."
    ),
]
