"""A stack that computes task by task: the fewest operations, some launches for each task.

The way on a CPU, where arithmetic decides. It computes with the slots' weights as they lie there.
"""

from __future__ import annotations

from collections.abc import Mapping

from lobra.model.adapter import AdapterSpec
from lobra.model.part import Part
from lobra.model.slot import Slot
from lobra.model.stack import Stack
from lobra.model.token_tasks import TokenTasks


class SegmentStack(Stack):
    """A part is the tokens of a segment, and goes through the factors of its task."""

    def joins(self, spec: AdapterSpec) -> bool:
        """Return False."""
        return False

    def arrange_joined(self, slots: Mapping[int, Slot]) -> None:
        """Do nothing: there are none."""

    def joined_parts(self, tasks: TokenTasks) -> list[Part]:
        """Return nothing."""
        return []
