"""Whose the tokens of a micro-batch are, and what drops out of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lobra.model.adapter import AdapterSpec
from lobra.model.dropout import TokenNoise


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of a flattened micro-batch are of the task with this number."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class TokenTasks:
    """Whose the tokens of a micro-batch are; `noise` is what LoRA dropout needs (None: off).

    `apart` has each task computed by itself, whatever the stack. `shared` is what stacks work out
    of all this once: for all layers alike, or for a layer that runs twice.
    """

    segments: tuple[Segment, ...]
    noise: TokenNoise | None = None
    apart: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, init=False, compare=False)

    def drops(self, specs: Iterable[AdapterSpec]) -> bool:
        """Return whether something of these adapters' inputs drops out."""
        return self.noise is not None and any(spec.dropout > 0.0 for spec in specs)

    def part(self, tokens: slice) -> TokenTasks:
        """Return whose some of the tokens are, counted from the first of them."""
        segments = tuple(
            Segment(own.number, max(own.start, tokens.start) - tokens.start,
                    min(own.stop, tokens.stop) - tokens.start)
            for own in self.segments
            if own.start < tokens.stop and own.stop > tokens.start
        )  # fmt: skip
        noise = None if self.noise is None else self.noise.part(tokens)
        return TokenTasks(segments, noise, self.apart)


NOBODYS = TokenTasks(())


@dataclass
class Selection:
    """The micro-batch that is being computed (one object a stage)."""

    tasks: TokenTasks = NOBODYS
