"""A stack that computes task by task: the fewest operations, some launches for each task.

The way on a CPU, where arithmetic decides. It computes with the slots' weights as they lie there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lobra.model.slot import Slot
from lobra.model.stack import Part, Stack
from lobra.model.token_tasks import Segment, TokenTasks


class SegmentStack(Stack):
    """A part is the tokens of a segment, and goes through the factors of its task."""

    def arrange_trained(self, slots: Mapping[int, Slot]) -> None:
        """Compute with what is trained in these slots from now on."""
        self.specs = {number: slot.spec for number, slot in slots.items()}
        self.trained = {
            number: part
            for number, slot in slots.items()
            if (part := self.own_part(slot, slot.weights))
        }

    def trained_parts(self, tasks: TokenTasks) -> list[Part]:
        """Return a part for each segment whose task has an adapter here."""
        return [
            self._part(segment, tasks)
            for segment in tasks.segments
            if segment.number in self.trained
        ]

    def _part(self, segment: Segment, tasks: TokenTasks) -> Part:
        part, tokens = self.trained[segment.number], slice(segment.start, segment.stop)
        if not tasks.drops([self.specs[segment.number]]):
            return replace(part, tokens=tokens)
        linears = [output.linear for output in part.factors.outputs]
        draw = partial(self.keep_factors, linears, tokens, tasks)
        return replace(part, tokens=tokens, draw_keep_factors=draw)
