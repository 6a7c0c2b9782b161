"""A stack that computes all tasks at once: few launches, whatever the number of tasks.

The way on a GPU, which would wait for launches. All A of the stack are one matrix, and all B of a
linear; what is of another task than the token's is multiplied by zero. Tasks that a large
micro-batch lacks are left out of the matrices, and of many tasks a few at a time are computed. As
zero times infinity is not zero, a task whose numbers are not finite spoils those of all in its
micro-batch; such a step is computed again with tasks apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lobra.model.adapter import AdapterSpec
from lobra.model.dropout import InputDropout
from lobra.model.part import Factors, Outputs, Part, Rows
from lobra.model.precision import kept_dtype
from lobra.model.slot import Slot
from lobra.model.stack import Adapter, Stack
from lobra.model.to_device import sent_together
from lobra.model.token_tasks import Segment, TokenTasks


@dataclass(frozen=True)
class _Present:
    """The rows of A and of each linear's B that a micro-batch needs; the same in layers alike.

    `rows_A` and `rows_B` are None where all are needed. `columns` are each linear's of x A^T, and
    `scaling_NR` is what that is multiplied by.
    """

    scaling_NR: Tensor
    columns: tuple[slice, ...]
    rows_A: Tensor | None
    rows_B: tuple[Tensor | None, ...]


class JointStack(Stack):
    """All tokens of a micro-batch are one part; a segment's tokens where tasks are apart.

    A part's tasks have at most `most_ranks` together, or there is one task only. Every token goes
    through all of them: a rank is 0.056 % of the operations of the frozen products of an 8B layer
    (7 linears, 3 products with A and B each beside 2 with the weight), so 256 are 14 %. Less would
    be more launches for 16 tasks than for one.

    Tasks without tokens are left out where that spares more than `least_spared` ranks x tokens. It
    takes 22 launches to gather the others' rows, in which an H100 computes about as many.
    """

    most_ranks = 256
    least_spared = 1 << 17

    def joins(self, spec: AdapterSpec) -> bool:
        """Return whether an adapter is nothing but a low-rank update."""
        return spec.kind not in ("dora", "vera")

    def arrange_joined(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the adapters in these slots, all that are joined, from now on."""
        self.ranks = {number: slot.spec.largest_rank for number, slot in slots.items()}
        self.adapters: list[list[Adapter]] = [[] for _ in self.bases]
        for number in sorted(slots):
            for adapter in self.adapters_of(slots[number], slots[number].weights):
                self.adapters[adapter.linear].append(adapter)
        # What of the adapters a micro-batch's scaling and choice of rows depend on.
        self.rows = tuple(
            tuple((one.number, len(one.A_ri), one.scaling) for one in own) for own in self.adapters
        )
        self.A_Ri = self._joined([one.A_ri for own in self.adapters for one in own])
        self.B_Ro = [self._joined([one.B_ro for one in own]) for own in self.adapters]

    def _joined(self, weights: Sequence[Tensor]) -> Tensor:
        """Return a copy of weights, one below the other, that `refresh` renews."""
        rows, num_columns = [len(one) for one in weights], weights[0].shape[1] if weights else 0
        joined = torch.empty(sum(rows), num_columns, dtype=self.dtype, device=self.device)
        for copy, one in zip(joined.split(rows), weights, strict=True):
            self.copy_on_refresh(copy, one)
        return joined

    def joined_parts(self, tasks: TokenTasks) -> list[Part]:
        """Return the parts: as few as may be, or one for each segment if tasks are to be apart."""
        most_ranks = 0 if tasks.apart else self.most_ranks
        parts = (self._part(together, tasks) for together in self._together(tasks, most_ranks))
        return [part for part in parts if part is not None]

    def _together(self, tasks: TokenTasks, most_ranks: int) -> Iterator[tuple[Segment, ...]]:
        """Yield consecutive segments whose tasks have at most so many ranks, else one segment.

        A task's ranks count whether or not it has an adapter here: all stacks divide alike.
        """
        start, ranks = 0, {}
        for place, segment in enumerate(tasks.segments):
            ranks[segment.number] = self.ranks.get(segment.number, 0)
            if place > start and sum(ranks.values()) > most_ranks:
                yield tasks.segments[start:place]
                start, ranks = place, {segment.number: ranks[segment.number]}
        if tasks.segments:
            yield tasks.segments[start:]

    def _part(self, segments: Sequence[Segment], tasks: TokenTasks) -> Part | None:
        """Return the part of consecutive segments, or None where none has an adapter here."""
        numbers: Set[int] = {segment.number for segment in segments}
        if not tasks.apart and self._may_all_be_there(numbers, segments):
            numbers = self.ranks.keys()
        own = [[one for one in adapters if one.number in numbers] for adapters in self.adapters]
        if not any(own):
            return None
        key = (self.rows, segments)
        if key not in tasks.shared:
            tasks.shared[key] = self._present(segments, numbers)
        present: _Present = tasks.shared[key]
        outputs = tuple(
            Outputs(
                linear,
                present.columns[linear],
                Rows(
                    self.B_Ro[linear],
                    tuple(one.gradient_B for one in adapters),
                    present.rows_B[linear],
                ),
            )
            for linear, adapters in enumerate(own)
            if adapters
        )
        gradients_A = tuple(one.gradient_A for adapters in own for one in adapters)
        factors = Factors(Rows(self.A_Ri, gradients_A, present.rows_A), outputs)
        tokens = slice(segments[0].start, segments[-1].stop)
        dropouts: tuple[InputDropout, ...] = ()
        if tasks.drops(one.spec for adapters in own for one in adapters):
            dropouts = self.dropouts([output.linear for output in outputs], tokens, tasks)
        return Part(tokens, factors, present.scaling_NR, dropouts=dropouts)

    def _may_all_be_there(self, numbers: Set[int], segments: Sequence[Segment]) -> bool:
        """Return whether tasks without tokens cost too little to leave them out."""
        total = sum(self.ranks.values())
        absent = total - sum(self.ranks.get(number, 0) for number in numbers)
        num_tokens = segments[-1].stop - segments[0].start
        return total <= self.most_ranks and absent * num_tokens <= self.least_spared

    def _present(self, segments: Sequence[Segment], numbers: Set[int]) -> _Present:
        of_row: list[int] = []
        scaling: list[float] = []
        rows_A: list[int] = []
        rows_B: list[list[int]] = []
        num_rows = 0
        for adapters in self.adapters:
            taken: list[int] = []
            row = 0
            for one in adapters:
                rank = len(one.A_ri)
                if one.number in numbers:
                    taken += range(row, row + rank)
                    of_row += [one.number] * rank
                    scaling += [one.scaling] * rank
                row += rank
            rows_A += [num_rows + row for row in taken]
            rows_B.append(taken)
            num_rows += row
        stops = list(accumulate(map(len, rows_B)))
        whole = len(rows_A) == num_rows
        of_segment = [segment.number for segment in segments]
        lengths = [segment.stop - segment.start for segment in segments]
        gathered = [] if whole else [rows_A, *rows_B]
        numbers_S, lengths_S, of_row_R, scaling_R, *sent = sent_together(
            [
                np.array(of_segment),
                np.array(lengths),
                np.array(of_row),
                np.array(scaling).view(np.int64),
                *(np.array(rows, dtype=np.int64) for rows in gathered),
            ],
            self.device,
        )
        of_token = numbers_S.repeat_interleave(lengths_S, output_size=sum(lengths))
        # Not in the activations' dtype: bf16 would round a scaling such as 4/3 by 0.3 %.
        scaling_R = scaling_R.view(torch.float64).to(kept_dtype(self.dtype))
        return _Present(
            scaling_NR=(of_token.unsqueeze(1) == of_row_R) * scaling_R,
            columns=tuple(map(slice, [0, *stops], stops)),
            rows_A=None if whole else sent[0],
            rows_B=(None,) * len(rows_B) if whole else tuple(sent[1:]),
        )
