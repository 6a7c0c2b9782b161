"""The adapters of all tasks on the linears that share an input: one autograd function an input.

    y = x W^T + s (x A^T) B^T    for each linear and token, with A, B and s of the token's task

The function adds the updates into the base products and, in the backward pass, the gradients of A
and B into their slots: autograd knows of neither. Column-parallel linears compute with B's columns
of their shard, row-parallel ones with A's; one reduction then serves base and adapters, since both
are linear.

Shape suffixes: N tokens, n those of a part, i and o input and output features of this rank's shard,
R rows of A or B: a task's ranks, or those of several tasks and linears, one below the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lobra.layout.layout import ADAPTER_HIDDEN
from lobra.model.adapter import AdapterSpec
from lobra.model.base_linear import BaseLinear, Shard
from lobra.model.dropout import InputDropout, feature_keys
from lobra.model.magnitude import Magnitude
from lobra.model.memory_policy import kept, trains
from lobra.model.part import Factors, Outputs, Part, Rows
from lobra.model.precision import kept_dtype
from lobra.model.site import Site
from lobra.model.slot import Slot
from lobra.model.tensor_parallel import Group
from lobra.model.token_tasks import Segment, Selection, TokenTasks
from lobra.model.vera import Projections, Vectors


@dataclass(frozen=True)
class Adapter:
    """A task's A and B on one linear of a stack, cut to the shard: views into its slot."""

    linear: int
    number: int
    spec: AdapterSpec
    scaling: float
    A_ri: Tensor
    B_ro: Tensor
    gradient_A: Tensor
    gradient_B: Tensor


class Stack(ABC):
    """The adapters of all tasks on the linears of one layer that share an input.

    Weights and gradients are in the slots. What a stack computes with are views of the weights
    where these are in the activations' dtype and laid out as it needs them, else copies.
    """

    def __init__(
        self, sites: Sequence[Site], shards: Sequence[Shard], bases: Sequence[BaseLinear],
        selection: Selection, dtype: torch.dtype, device: torch.device, group: Group = None,
    ) -> None:  # fmt: skip
        """Make a stack without adapters, of activations of this dtype.

        ``group`` is what row-parallel outputs are summed over.
        """
        self.group = group
        self.sites, self.shards, self.bases = tuple(sites), tuple(shards), tuple(bases)
        self.selection = selection
        self.dtype, self.device = dtype, device
        self.feature_keys = [
            feature_keys(site.layer, site.module, site.in_features).to(device) for site in sites
        ]
        self.fuses_dropout = False
        # Autograd is to call the function's backward also where the input needs no gradient.
        self.anchor = torch.zeros((), requires_grad=True)
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = []
        self._copies: list[Tensor] = []
        self._copied: list[Tensor] = []
        self._magnitudes: list[Magnitude] = []

    def arrange(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the adapters in these slots from now on."""
        self._copies, self._copied, self._magnitudes = [], [], []
        joined = {number: slot for number, slot in slots.items() if self.joins(slot.spec)}
        self.arrange_joined(joined)
        self.specs = {number: slot.spec for number, slot in slots.items()}
        self.own: dict[int, list[Part]] = {}
        for number, slot in slots.items():
            parts = []
            if slot.projections is not None:
                parts += self._projected_parts(slot, slot.projections)
            elif number not in joined:
                parts += self._low_rank_parts(slot, slot.weights)
            if slot.start is not None:
                parts += [part.frozen() for part in self._low_rank_parts(slot, slot.start)]
            self.own[number] = parts
        self.refresh()

    @abstractmethod
    def joins(self, spec: AdapterSpec) -> bool:
        """Return whether what is trained of an adapter is computed together with others'."""

    @abstractmethod
    def arrange_joined(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the adapters in these slots, all that are joined, from now on."""

    @abstractmethod
    def joined_parts(self, tasks: TokenTasks) -> list[Part]:
        """Return the parts of a micro-batch's tasks that are joined, without overlap."""

    def parts(self, tasks: TokenTasks) -> list[Part]:
        """Return all parts of a micro-batch; frozen factors are on tokens of other parts."""
        own = [
            self._on(segment, part, tasks)
            for segment in tasks.segments
            for part in self.own.get(segment.number, ())
        ]
        return [*self.joined_parts(tasks), *own]

    def _parts_now(self) -> list[Part]:
        """Return the parts of the micro-batch that is computed, the same when it runs again."""
        tasks = self.selection.tasks
        if not tasks.segments:
            return []
        if self not in tasks.shared:
            tasks.shared[self] = self.parts(tasks)
        parts: list[Part] = tasks.shared[self]
        return parts

    def _on(self, segment: Segment, part: Part, tasks: TokenTasks) -> Part:
        """Return a task's part on a segment of its tokens."""
        tokens = slice(segment.start, segment.stop)
        if not part.drops or not tasks.drops([self.specs[segment.number]]):
            return replace(part, tokens=tokens)
        linears = [output.linear for output in part.factors.outputs]
        return replace(part, tokens=tokens, dropouts=self.dropouts(linears, tokens, tasks))

    def _projected_parts(self, slot: Slot, projections: Projections) -> list[Part]:
        """Return, of no tokens, a part for each linear that a VeRA adapter is on."""
        parts = []
        for linear, (site, shard) in enumerate(zip(self.sites, self.shards, strict=True)):
            if tensors := slot.spec.tensors(site):
                (d_r, b_o), (gradient_d_r, gradient_b_o) = (
                    [tensor.cut(slot.layout.rows(flat, tensor), shard)[0] for tensor in tensors]
                    for flat in (slot.weights, slot.gradient)
                )
                A_ri = projections.A_rI[:, shard.inputs.start : shard.inputs.stop]
                B_ro = projections.B_at(site)[:, shard.outputs.start : shard.outputs.stop]
                output = Outputs(linear, slice(len(d_r)), Rows(B_ro, ()))
                vectors = Vectors(b_o, gradient_b_o, gradient_d_r)
                parts.append(Part(slice(0), Factors(Rows(A_ri, ()), (output,)), d_r, vectors))
        return parts

    def _low_rank_parts(self, slot: Slot, weights: Tensor) -> list[Part]:
        """Return, of no tokens, a part with all of a task's factors, if it has any here.

        ``weights`` are the slot's, or those it started from. A of all linears lie there one below
        the other.
        """
        if not (adapters := self.adapters_of(slot, weights)):
            return []
        all_A = [slot.spec.tensors(self.sites[one.linear])[0] for one in adapters]
        A_Ri, gradient = (
            all_A[0].cut(slot.layout.rows(flat, *all_A), self.shards[0])
            for flat in (weights, slot.gradient)
        )
        stops = accumulate(len(one.A_ri) for one in adapters)
        outputs = tuple(
            Outputs(
                one.linear,
                slice(stop - len(one.A_ri), stop),
                Rows(self._computed(one.B_ro), (one.gradient_B,)),
                self._magnitude(slot, one),
            )
            for one, stop in zip(adapters, stops, strict=True)
        )
        scaling_R = torch.tensor(
            [one.scaling for one in adapters for _ in one.A_ri],
            dtype=kept_dtype(self.dtype),
            device=self.device,
        )
        factors = Factors(Rows(self._computed(A_Ri), (gradient,)), outputs)
        return [Part(slice(0), factors, scaling_R)]

    def _magnitude(self, slot: Slot, adapter: Adapter) -> Magnitude | None:
        """Return the magnitudes of a DoRA adapter, which `refresh` renews."""
        if slot.spec.kind != "dora":
            return None
        linear = adapter.linear
        vector = slot.spec.tensors(self.sites[linear])[2]
        m_1o, gradient_1o = (
            vector.cut(slot.layout.rows(flat, vector), self.shards[linear])
            for flat in (slot.weights, slot.gradient)
        )
        magnitude = Magnitude(
            self.bases[linear], self.dtype, adapter.scaling, adapter.A_ri, adapter.B_ro,
            m_1o[0], gradient_1o[0],
        )  # fmt: skip
        self._magnitudes.append(magnitude)
        return magnitude

    def _computed(self, weights: Tensor) -> Tensor:
        """Return the weights themselves or, for activations of another dtype, a copy."""
        if weights.dtype == self.dtype:
            return weights
        copy = weights.to(self.dtype)
        self.copy_on_refresh(copy, weights)
        return copy

    def adapters_of(self, slot: Slot, weights: Tensor) -> list[Adapter]:
        """Return a task's adapters on the linears of the stack, in their order.

        ``weights`` are the slot's, or those it started from.
        """
        found = []
        for linear, (site, shard) in enumerate(zip(self.sites, self.shards, strict=True)):
            if tensors := slot.spec.tensors(site):
                views = (
                    tensor.cut(slot.layout.rows(flat, tensor), shard)
                    for flat in (weights, slot.gradient)
                    for tensor in tensors[:2]
                )
                scaling = slot.spec.scaling(site)
                found.append(Adapter(linear, slot.number, slot.spec, scaling, *views))
        return found

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies it computes with."""
        return sum(copy.nbytes for copy in self._copies)

    def copy_on_refresh(self, copy: Tensor, weights: Tensor) -> None:
        """Have `refresh` copy these weights."""
        self._copies.append(copy)
        self._copied.append(weights)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights anew, after they have changed. With DoRA collective over the group."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._copied)
        if self._magnitudes:
            squares = [magnitude.squares_o() for magnitude in self._magnitudes]
            whole = torch.cat(squares)
            if self.group is not None:
                dist.all_reduce(whole, group=self.group)
            for magnitude, own in zip(
                self._magnitudes, whole.split([len(one) for one in squares]), strict=True
            ):
                magnitude.renew(own)

    def dropouts(
        self, linears: Sequence[int], tokens: slice, tasks: TokenTasks
    ) -> tuple[InputDropout, ...]:
        """Return what drops out of these linears' inputs: of a task without dropout, nothing."""
        assert tasks.noise is not None
        noise = tasks.noise.part(tokens)
        return tuple(
            InputDropout(
                noise, self.feature_keys[linear], self.shards[linear].inputs, self.fuses_dropout
            )
            for linear in linears
        )

    def products(
        self, x: Tensor, parts: Sequence[Part], hidden: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return each linear's [..., o] of x [..., i], by the parts and their `hidden` of x."""
        ys = tuple(base(x) for base in self.bases)
        x_Ni, ys_No = _by_token(x), [_by_token(y) for y in ys]
        for part, h_nR in zip(parts, hidden, strict=True):
            n = part.tokens
            part.add_update(self.bases, x_Ni[n], h_nR, [y_No[n] for y_No in ys_No])
        return ys

    def gradients(
        self,
        x: Tensor | None,
        parts: Sequence[Part],
        hidden: Sequence[Tensor],
        dys: Sequence[Tensor],
        wants_input: bool,
    ) -> Tensor | None:
        """Add the gradients of what is trained into the slots, by those of the products.

        Returns
        -------
        Tensor or None
            The gradient of x [..., i], if it is wanted.
        """
        dys_No = [_by_token(dy) for dy in dys]
        dx_Ni = None
        if wants_input:
            for base, dy_No in zip(self.bases, dys_No, strict=True):
                dx_Ni = base.input_gradient(dy_No, dx_Ni)
        for part, h_nR in zip(parts, hidden, strict=True):
            assert x is not None
            n = part.tokens
            dx_ni = None if dx_Ni is None else dx_Ni[n]
            dys_no = [dy_No[n] for dy_No in dys_No]
            part.add_gradients(self.bases, _by_token(x)[n], h_nR, dys_no, dx_ni)
        return None if dx_Ni is None else dx_Ni.view(*dys[0].shape[:-1], -1)

    def output(self, x: Tensor, linear: int) -> Tensor:
        """Return a linear's [..., o] of x [..., i], before any reduction.

        The first linear that is asked for an input computes all of them.
        """
        if self._input is not x or self._outputs[linear] is None:
            parts = self._parts_now()
            anchor = None
            if parts:
                anchor = self.anchor
                trains()
            self._input, self._outputs = x, list(_Products.apply(x, anchor, self, parts))
        output, self._outputs[linear] = self._outputs[linear], None
        if not any(waiting is not None for waiting in self._outputs):
            self._input = None
        assert output is not None
        return output


class _Products(torch.autograd.Function):
    """Base products and updates of all linears of a stack."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor | None, stack: Stack, parts: list[Part]
    ) -> tuple[Tensor, ...]:
        ctx.stack, ctx.parts = stack, parts

        def all_hidden() -> tuple[Tensor, ...]:
            x_Ni = _by_token(x)
            return tuple(part.hidden(x_Ni[part.tokens]) for part in parts)

        hidden = kept(ADAPTER_HIDDEN, all_hidden)
        ctx.save_for_backward(*([x, *hidden] if hidden else []))
        products = partial(stack.products, x, parts, hidden)
        return kept(stack.sites[0].module, products)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stack: Stack = ctx.stack
        x, *hidden = ctx.saved_tensors if ctx.parts else (None,)
        dx = stack.gradients(x, ctx.parts, hidden, gradients, ctx.needs_input_grad[0])
        return dx, None, None, None


def _by_token(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
