"""LongRoPE (arXiv 2402.13753) by each sequence's own length, whatever it is batched with.

It has two tables of frequencies, one for sequences up to the length that the model was first
trained on, one for longer ones. transformers picks one for all rows of a batch, by the largest
position in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.to_device import to_device

LONG_ROPE = "longrope"


class OwnLengthRope(nn.Module):
    """A rotary embedding of transformers, asked for both tables.

    `read` a micro-batch before its tokens are embedded.
    """

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.short_length: int = rotary.config.rope_parameters["original_max_position_embeddings"]
        self.is_long: Tensor | None = None

    def read(self, batch: MicroBatchTensors) -> None:
        """Note which tokens are of long sequences."""
        self.is_long = None
        long = [length > self.short_length for length in batch.lengths]
        if not any(long):
            return
        if batch.packing is None:
            is_long_BS1 = torch.tensor(long)[:, None, None]
        else:
            spans_N = torch.tensor(batch.packing.lengths)
            long += [False] * (len(spans_N) - len(long))  # the padding
            is_long_BS1 = torch.tensor(long).repeat_interleave(spans_N)[None, :, None]
        self.is_long = to_device(is_long_BS1, batch.tokens_BS.device)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        """Return cosines and sines [B, S, d] of every token (B is 1 where all rows are alike)."""
        short = self.rotary(x, position_ids.clamp(max=self.short_length - 1))
        if self.is_long is None:
            return tuple(short)
        beyond = torch.full_like(position_ids[:, :1], self.short_length)
        long = self.rotary(x, torch.cat([position_ids, beyond], dim=1))
        return tuple(
            torch.where(self.is_long, of_long[:, :-1], of_short)
            for of_long, of_short in zip(long, short, strict=True)
        )
