"""The embedding over this rank's slice of the vocabulary, with the adapters that tasks have on it.

    y = E[token] + s (B A[:, token])    with A [r, V], B [D, r] and s of the token's task

Each rank of the tensor-parallel group adds what follows from the tokens in its slice of the
vocabulary; one sum serves both.

Shape suffixes: B batch rows, S sequence positions, N their tokens, n those of a segment, D hidden,
V vocabulary, v this rank's slice of it, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lobra.model.arranged import Arranged, trained_view
from lobra.model.slot import Slot
from lobra.model.tensor_parallel import Group, reduce_from_group
from lobra.model.token_tasks import Selection
from lobra.tasks.target_modules import EMBEDDING


@dataclass(frozen=True)
class _Factors:
    """A task's A, of the whole vocabulary, B and scaling."""

    A_rV: Tensor
    B_rD: Tensor
    scaling: float


class VocabParallelEmbedding(Arranged):
    """Rows [start, stop) of the token embedding; the sum over the group is the embedding.

    `weight` [v, D] is frozen; Gemma multiplies what comes out by `scale`, in the weight's dtype. As
    in torch, nothing is learned of a model's own `padding_token`.
    """

    def __init__(
        self,
        weight_vD: Tensor,
        rows: range,
        group: Group,
        selection: Selection,
        scale: float | None = None,
        padding_token: int | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_vD, requires_grad=False)
        self.rows = rows
        self.group = group
        self.selection = selection
        self.scale = None if scale is None else float(torch.tensor(scale, dtype=weight_vD.dtype))
        self.padding_token = padding_token
        self.factors: dict[int, _Factors] = {}

    def arrange(self, slots: Mapping[int, Slot]) -> None:
        """Compute with the adapters in these slots from now on."""
        self.factors = {}
        for number, slot in slots.items():
            tensors = [t for t in slot.layout.tensors if t.site.module == EMBEDDING]
            if not tensors:
                continue
            A, B = tensors
            A_rV, gradient_A, B_rD, gradient_B = (
                slot.layout.rows(flat, tensor)
                for tensor in (A, B)
                for flat in (slot.weights, slot.gradient)
            )
            self.factors[number] = _Factors(
                trained_view(A_rV, gradient_A),
                trained_view(B_rD, gradient_B),
                slot.spec.scaling(A.site),
            )

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return the embeddings [B, S, D]."""
        embedded_BSD = self._embed(tokens_BS)
        return embedded_BSD if self.scale is None else embedded_BSD * self.scale

    def _embed(self, tokens_BS: Tensor) -> Tensor:
        if self.group is None:
            whole_BSD = functional.embedding(tokens_BS, self.weight, self.padding_token)
            return self._adapted(whole_BSD, tokens_BS)
        local_BS = tokens_BS - self.rows.start
        outside_BS = (local_BS < 0) | (local_BS >= len(self.rows))
        local_BS = local_BS.masked_fill(outside_BS, 0)
        padding = self.padding_token
        own_padding = None
        if padding is not None and padding in self.rows:
            own_padding = padding - self.rows.start
        embedded_BSD = functional.embedding(local_BS, self.weight, own_padding)
        embedded_BSD = embedded_BSD.masked_fill(outside_BS.unsqueeze(-1), 0.0)
        embedded_BSD = self._adapted(embedded_BSD, tokens_BS, outside_BS)
        return reduce_from_group(embedded_BSD, self.group, EMBEDDING)

    def _adapted(
        self, embedded_BSD: Tensor, tokens_BS: Tensor, outside_BS: Tensor | None = None
    ) -> Tensor:
        """Return embeddings with the updates of the tokens that are not outside of this slice."""
        segments = self.selection.tasks.segments
        if not any(segment.number in self.factors for segment in segments):
            return embedded_BSD
        embedded_ND, pieces = embedded_BSD.flatten(0, 1), []
        for segment in segments:
            n = slice(segment.start, segment.stop)
            piece_nD = embedded_ND[n]
            if factors := self.factors.get(segment.number):
                tokens_n = tokens_BS.flatten()[n]
                h_nr = functional.embedding(tokens_n, factors.A_rV.t(), self.padding_token)
                if outside_BS is not None:
                    h_nr = h_nr.masked_fill(outside_BS.flatten()[n].unsqueeze(-1), 0.0)
                dtype = piece_nD.dtype
                piece_nD = piece_nD + (h_nr.to(dtype) @ factors.B_rD.to(dtype)) * factors.scaling
            pieces.append(piece_nD)
        return torch.cat(pieces).view(embedded_BSD.shape)
