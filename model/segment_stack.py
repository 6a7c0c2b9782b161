"""A stack that computes task by task: the fewest operations, some launches for each task.

The way on a CPU, where arithmetic decides. It computes with the slots' weights as they lie there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from lobra.model.precision import kept_dtype
from lobra.model.slot import Slot
from lobra.model.stack import Adapter, Factors, Outputs, Part, Rows, Stack
from lobra.model.token_tasks import Segment, TokenTasks


class SegmentStack(Stack):
    """A part is the tokens of a segment, and goes through the factors of its task."""

    def arrange(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the adapters in these slots from now on."""
        self.forget_copies()
        self.adapters: dict[int, list[Adapter]] = {}
        self.factors: dict[int, Factors] = {}
        self.scaling_R: dict[int, Tensor] = {}
        for number, slot in slots.items():
            if adapters := self.adapters_of(slot):
                self.adapters[number] = adapters
                self.factors[number] = self._factors(slot, adapters)
                scaling = [one.scaling for one in adapters for _ in one.A_ri]
                self.scaling_R[number] = torch.tensor(
                    scaling, dtype=kept_dtype(self.dtype), device=self.device
                )
        self.refresh()

    def _factors(self, slot: Slot, adapters: list[Adapter]) -> Factors:
        """Return a task's factors; its A of all linears lie one below the other in its slot."""
        shard, stops = self.shards[0], list(accumulate(len(one.A_ri) for one in adapters))
        all_A = [slot.spec.tensors(self.sites[one.linear])[0] for one in adapters]
        weights, gradient = (
            all_A[0].cut(slot.layout.rows(flat, *all_A), shard)
            for flat in (slot.weights, slot.gradient)
        )
        outputs = tuple(
            Outputs(
                one.linear,
                slice(stop - len(one.A_ri), stop),
                Rows(self._computed(one.B_ro), (one.gradient_B,)),
            )
            for stop, one in zip(stops, adapters, strict=True)
        )
        return Factors(Rows(self._computed(weights), (gradient,)), outputs)

    def _computed(self, weights: Tensor) -> Tensor:
        """Return the weights themselves or, for activations of another dtype, a copy."""
        if weights.dtype == self.dtype:
            return weights
        copy = weights.to(self.dtype)
        self.copy_on_refresh(copy, weights)
        return copy

    def parts(self, tasks: TokenTasks) -> list[Part]:
        """Return a part for each segment whose task has an adapter here."""
        return [
            self._part(segment, tasks)
            for segment in tasks.segments
            if segment.number in self.factors
        ]

    def _part(self, segment: Segment, tasks: TokenTasks) -> Part:
        adapters = self.adapters[segment.number]
        spec = adapters[0].spec
        tokens = slice(segment.start, segment.stop)
        linears = [one.linear for one in adapters]
        draw = partial(self.keep_factors, linears, tokens, tasks) if tasks.drops([spec]) else None
        number = segment.number
        return Part(tokens, self.factors[number], self.scaling_R[number], draw)
