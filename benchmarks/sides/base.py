"""The limit: the frozen base alone, packed; no adapter, the gradient ends at the embeddings.

Transformers' own layers over one row of whole sequences, end to end, with an attention that stays
inside each. Nothing of the project's model is used: it is measured against this.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import record_function

from benchmarks.sides.side import COMPUTE, Batch, Clock, Setting, Step, Trained, num_labels, sent

ATTENTION = "benchmark_packed"


class PackedAttention:
    """Causal attention inside each sequence of a packed row, as transformers calls it.

    Queries are [1, H, T, D], keys and values [1, K, T, D] with K dividing H; the output is
    [1, T, H, D]. On a GPU it is torch's attention for sequences of any length, else torch's usual
    one for each run of sequences of one length.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.bounds: Tensor | None = None  # int32 [sequences + 1], on a GPU

    def pack(self, lengths: list[int], device: torch.device) -> None:
        """Set the lengths of the sequences in the row."""
        self.lengths = lengths
        if device.type == "cuda":
            self.bounds = sent(device, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))[0]

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **_: Any
    ) -> tuple[Tensor, None]:
        """Return the output and, as transformers wants it, no weights."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        if self.bounds is None:
            return self._by_length(query, key, value), None
        return self._varlen(query, key, value, self.bounds), None

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # its first version said so with a flag, later ones with a window that ends at the token
        flag = "is_causal" in inspect.signature(varlen_attn).parameters
        causal: dict[str, Any] = {"is_causal": True} if flag else {"window_size": (-1, 0)}
        longest = max(self.lengths)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        output = varlen_attn(q, k, v, bounds, bounds, longest, longest, **causal)
        assert isinstance(output, Tensor)  # a pair where more was asked for
        return output[None]

    def _by_length(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]
        sizes = [length * count for length, count in runs]
        outputs = []
        parts = (x[0].split(sizes, dim=1) for x in (query, key, value))
        for (length, count), *part in zip(runs, *parts, strict=True):
            q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in part)
            output = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[None]


class PackedBase:
    """Forward and backward passes of the frozen base."""

    def __init__(self, setting: Setting) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM

        self.attention = PackedAttention()
        AttentionInterface.register(ATTENTION, self.attention)
        self.setting = setting
        self.device = torch.device(setting.device)
        self.model = AutoModelForCausalLM.from_pretrained(
            setting.folder, dtype=setting.dtype, attn_implementation=ATTENTION
        ).to(self.device)
        self.model.requires_grad_(False)

    def train(self, step: Step) -> Trained:
        """Compute a step's losses and the gradient of the embeddings' output."""
        clock = Clock(self.setting.device)
        labels = torch.zeros(self.setting.num_tasks, dtype=torch.float64)
        for sequence in step:
            labels[sequence.task] += len(sequence.targets)
        batches = first_fit_decreasing(step, self.setting.job.max_tokens)
        losses = torch.zeros(self.setting.num_tasks, device=self.device)
        for batch in batches:
            self._add_losses(batch, losses, num_labels(step))
        time_s = clock.seconds()
        means = tuple((losses.double().cpu() / labels).tolist())
        tokens = sum(len(sequence.tokens) for sequence in step)
        return Trained(time_s, time_s, means, len(batches), tokens)

    def _add_losses(self, batch: Batch, losses: Tensor, total_labels: int) -> None:
        self.attention.pack([len(sequence.tokens) for sequence in batch], self.device)
        tokens, positions, learned, tasks = sent(self.device, *laid_out(batch))
        with record_function(COMPUTE):
            embedded = self.model.model.embed_tokens(tokens[None]).detach().requires_grad_()
            hidden = self.model.model(
                inputs_embeds=embedded, position_ids=positions[None], use_cache=False
            ).last_hidden_state[0]
            logits = self.model.lm_head(hidden.index_select(0, learned - 1)).float()
            targets = tokens.index_select(0, learned)
            found = functional.cross_entropy(logits, targets, reduction="none")
            (found.sum() / total_labels).backward()
            losses.index_add_(0, tasks, found.detach())


def laid_out(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a packed row: tokens, their positions, the places that are learned, whose they are."""
    lengths = [len(sequence.tokens) for sequence in batch]
    starts = np.cumsum([0, *lengths[:-1]])
    learned = [s.targets + start for s, start in zip(batch, starts, strict=True)]
    return (
        torch.from_numpy(np.concatenate([sequence.tokens for sequence in batch])).long(),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.from_numpy(np.concatenate(learned)),
        torch.cat([torch.full(s.targets.shape, s.task) for s in batch]),
    )


def first_fit_decreasing(step: Step, max_tokens: int) -> list[Batch]:
    """Return micro-batches of at most `max_tokens` tokens, a longer sequence alone in one.

    Sequences are placed from the longest on, each in the first micro-batch that has room.
    """
    batches: list[Batch] = []
    room: list[int] = []
    for sequence in sorted(step, key=lambda sequence: -len(sequence.tokens)):
        size = len(sequence.tokens)
        place = next((n for n, left in enumerate(room) if left >= size), len(batches))
        if place == len(batches):
            batches.append([])
            room.append(max_tokens)
        batches[place].append(sequence)
        room[place] -= size
    return batches
