"""The tensors of packed micro-batches, made and sent to the device all at once.

Shape suffixes: T packed tokens, padding included, P tokens to be predicted, N sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lobra.layout.sequences import IntArray, MicroBatch
from lobra.model.dropout import TaskNoise, TokenNoise, token_keys
from lobra.model.packed_attention import Packing
from lobra.model.stage import Targets


@dataclass(frozen=True, eq=False)
class PackedTensors:
    """One packed micro-batch on a rank.

    Attributes
    ----------
    tokens_1T
        int64 [1, T]: the sequences end to end, then padding.
    positions_1T
        int64 [1, T]: each token's place in its sequence.
    packing
        Where the sequences lie; the padding counts as one, so that nothing attends to it.
    targets
        What is to be predicted; its positions are places among the T tokens.
    segments
        Runs (task, start, stop) of tokens of one task, all T of them; padding is the last task's.
    noise
        What LoRA dropout needs; None where nothing drops out.
    """

    tokens_1T: Tensor
    positions_1T: Tensor
    packing: Packing
    targets: Targets
    segments: tuple[tuple[int, int, int], ...]
    noise: TokenNoise | None = None


def packed_tensors(
    micro_batches: Sequence[MicroBatch],
    device: torch.device,
    dtype: torch.dtype,
    noise: Mapping[int, TaskNoise] | None = None,
) -> list[PackedTensors]:
    """Return the tensors of packed micro-batches, all sent in one copy the host does not wait for.

    Parameters
    ----------
    micro_batches
        As a rank runs them.
    dtype
        Of the activations.
    noise
        What LoRA dropout needs of every task, by its number; None: nothing drops out.
    """
    drops = noise is not None and any(task.dropout > 0.0 for task in noise.values())
    used = noise if drops else None
    arrays = [_arrays(micro_batch, used) for micro_batch in micro_batches]
    sent = iter(_sent([array for batch in arrays for array in batch], device))
    return [
        _tensors(micro_batch, [next(sent) for _ in batch], dtype)
        for micro_batch, batch in zip(micro_batches, arrays, strict=True)
    ]


def _arrays(micro_batch: MicroBatch, noise: Mapping[int, TaskNoise] | None) -> list[IntArray]:
    """Return tokens, positions, offsets, targets' three and, with dropout, keys and odds: int64."""
    sequences = micro_batch.sequences
    lengths_N = _lengths(micro_batch)
    ends_N = np.cumsum(lengths_N)
    starts_N = ends_N - lengths_N
    real = len(sequences)
    targets_N = np.array([len(sequence.targets) for sequence in sequences])
    tasks_N = np.array([sequence.task for sequence in sequences])
    tokens_T = np.zeros(ends_N[-1], dtype=np.int64)
    np.concatenate([sequence.tokens for sequence in sequences], out=tokens_T[: ends_N[real - 1]])
    places_P = np.concatenate([sequence.targets for sequence in sequences], dtype=np.int64)
    places_P += np.repeat(starts_N[:real], targets_N)
    arrays = [
        tokens_T,
        np.arange(ends_N[-1]) - np.repeat(starts_N, lengths_N),
        np.append(0, ends_N),
        places_P - 1,
        tokens_T[places_P],
        np.repeat(tasks_N, targets_N),
    ]
    if noise is not None:
        padding = len(lengths_N) - real
        of_sequence = [noise[sequence.task] for sequence in sequences]
        keys_T = token_keys(
            [task.seed for task in of_sequence] + [0] * padding,
            [task.step for task in of_sequence] + [0] * padding,
            [sequence.index for sequence in sequences] + [0] * padding,
            lengths_N,
        )
        dropout_N = np.array([task.dropout for task in of_sequence] + [0.0] * padding)
        arrays += [keys_T, np.repeat(dropout_N, lengths_N).view(np.int64)]
    return arrays


def _lengths(micro_batch: MicroBatch) -> IntArray:
    """Return int64 [N]: the tokens of every sequence, and the padding where there is any."""
    lengths = [len(sequence.tokens) for sequence in micro_batch.sequences]
    padding = micro_batch.padded_tokens - sum(lengths)
    return np.array([*lengths, padding] if padding else lengths, dtype=np.int64)


def _sent(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """Return the arrays on the device, as parts of one tensor."""
    whole = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0)
    if device.type == "cuda":
        whole = whole.pin_memory()
    return list(whole.to(device, non_blocking=True).split([len(array) for array in arrays]))


def _tensors(micro_batch: MicroBatch, sent: list[Tensor], dtype: torch.dtype) -> PackedTensors:
    """Return a micro-batch's tensors, of what `_arrays` made and was sent."""
    tokens_T, positions_T, offsets_N, *rest = sent
    targets, keys_and_odds = rest[:3], rest[3:]
    noise = None
    if keys_and_odds:
        keys_T, odds_T = keys_and_odds
        noise = TokenNoise.of_tokens(keys_T, odds_T.view(torch.float64), dtype)
    return PackedTensors(
        tokens_T[None],
        positions_T[None],
        Packing(tuple(_lengths(micro_batch).tolist()), offsets_N.to(torch.int32)),
        Targets(*targets),
        _segments(micro_batch),
        noise,
    )


def _segments(micro_batch: MicroBatch) -> tuple[tuple[int, int, int], ...]:
    """Return the runs of tokens of one task."""
    lengths_N = _lengths(micro_batch)
    ends_N = np.cumsum(lengths_N)[: len(micro_batch.sequences)]
    ends_N[-1] = lengths_N.sum()
    tasks_N = np.array([sequence.task for sequence in micro_batch.sequences])
    last_N = np.flatnonzero(np.append(np.diff(tasks_N), 1))
    stops = ends_N[last_N].tolist()
    return tuple(zip(tasks_N[last_N].tolist(), [0, *stops[:-1]], stops, strict=True))
