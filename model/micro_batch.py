"""The tensors of a rank's micro-batches, padded or packed, made and sent to the device all at once.

Packed, a micro-batch is one row: its sequences end to end, then padding.

Shape suffixes: B rows, S their tokens, padding included, T all tokens of a micro-batch, P tokens to
be predicted, N spans: each the tokens of a sequence or, packed, the padding at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lobra.layout.sequences import IntArray, Labels, MicroBatch
from lobra.layout.sequences import Sequence as TokenSequence
from lobra.model.contrast import Pull
from lobra.model.dropout import TokenNoise, token_keys
from lobra.model.objectives import Examples, ExampleWeights, task_examples
from lobra.model.packed_attention import Packing
from lobra.model.policy_loss import Rollouts
from lobra.model.precision import kept_dtype
from lobra.model.to_device import sent_together
from lobra.model.token_tasks import Segment


@dataclass(frozen=True, eq=False)
class Targets:
    """What a micro-batch is to predict: int64 [P] each.

    `positions_P` are places in the flattened [B, S] whose *next* token is `tokens_P`, of task
    `tasks_P`. `factors_P` is what each loss is multiplied by, float; None: its task's weight.
    `rollouts` are those that are learned by their advantages.

    `segments` are the runs of targets of one task, as the host knows them.
    """

    positions_P: Tensor
    tokens_P: Tensor
    tasks_P: Tensor
    factors_P: Tensor | None = None
    rollouts: Rollouts | None = None
    segments: tuple[Segment, ...] = field(default=(), kw_only=True)

    def learned(self, losses_P: Tensor) -> Tensor:
        """Return what is learned of the targets' cross-entropies: [P] each."""
        return losses_P if self.rollouts is None else self.rollouts.learned(losses_P)

    def none(self) -> Targets:
        """Return no targets, on the same device."""
        return Targets(self.positions_P[:0], self.tokens_P[:0], self.tasks_P[:0])


@dataclass(frozen=True, eq=False)
class MicroBatchTensors:
    """One micro-batch on a rank.

    Attributes
    ----------
    tokens_BS
        int64 [B, S]; packed, B is 1.
    positions_1S
        int64 [1, S]: each token's place in its sequence, the same in all rows.
    targets
        What is to be predicted, so that a GPU need not look for it, for which the host would wait.
    lengths
        The tokens of each sequence, padding not counted.
    segments
        Whose the flattened tokens are, all of them; padding is of the sequence before it.
    task_weights
        [tasks], what the summed loss of each task is multiplied by.
    packing
        Where the sequences lie; the padding counts as one, so that nothing attends to it. None:
        every row is a sequence.
    noise
        What LoRA dropout needs; None: nothing drops out.
    examples
        The sequences whose losses depend on one another; None: there are none.
    pull
        The sequences whose last states are drawn somewhere; None: there are none.
    """

    tokens_BS: Tensor
    positions_1S: Tensor
    targets: Targets
    lengths: tuple[int, ...]
    segments: tuple[Segment, ...]
    task_weights: Tensor
    packing: Packing | None = None
    noise: TokenNoise | None = None
    examples: Examples | None = None
    pull: Pull | None = None

    @property
    def ends_N(self) -> Tensor:
        """The place of each packed sequence's last token, int64, padding left out."""
        assert self.packing is not None, "padded sequences end in their rows"
        return self.packing.offsets_N[1 : 1 + len(self.lengths)].long() - 1

    def without_adapters(self) -> MicroBatchTensors:
        """Return the micro-batch as of no task: what the base model makes of it."""
        return replace(self, segments=(), targets=replace(self.targets, segments=()))


def micro_batch_tensors(
    micro_batches: Sequence[MicroBatch],
    task_weights: NDArray[np.float64],
    device: torch.device,
    dtype: torch.dtype,
    dropouts: Mapping[int, float] | None = None,
    example_weights: Mapping[int, ExampleWeights] | None = None,
) -> list[MicroBatchTensors]:
    """Return the tensors of micro-batches, all sent in one copy the host does not wait for.

    Parameters
    ----------
    micro_batches
        As a rank runs them.
    task_weights
        [tasks], what the summed loss of each task is multiplied by.
    dtype
        Of the activations.
    dropouts
        The probability with which a task's features drop out, by its number; None: none do.
    example_weights
        What examples count for, by the numbers of the tasks that have them.
    """
    drops = dropouts if dropouts and any(dropouts.values()) else None
    arrays = [_arrays(micro_batch, drops) for micro_batch in micro_batches]
    flat = [array for own in arrays for array in own]
    weights, *sent = sent_together([task_weights.view(np.int64), *flat], device)
    weights = weights.view(torch.float64).to(kept_dtype(dtype))
    of_batch = iter(sent)
    return [
        _tensors(micro_batch, [next(of_batch) for _ in own], weights, dtype, example_weights or {})
        for micro_batch, own in zip(micro_batches, arrays, strict=True)
    ]


def _arrays(micro_batch: MicroBatch, dropouts: Mapping[int, float] | None) -> list[IntArray]:
    """Return tokens, positions, the spans' offsets, targets' three; targets' factors if given.

    Then what rollouts and examples need, if there are any; keys and odds of dropout. All int64,
    floats by their bits.
    """
    sequences = micro_batch.sequences
    spans_N = _spans(micro_batch)
    ends_N = np.cumsum(spans_N)
    starts_N = ends_N - spans_N
    lengths_N = np.zeros_like(spans_N)
    lengths_N[: len(sequences)] = [len(sequence.tokens) for sequence in sequences]
    places_T = np.arange(ends_N[-1]) - np.repeat(starts_N, spans_N)
    tokens_T = np.zeros(ends_N[-1], dtype=np.int64)
    is_real_T = places_T < np.repeat(lengths_N, spans_N)
    tokens_T[is_real_T] = np.concatenate([sequence.tokens for sequence in sequences])
    num_targets = [len(sequence.targets) for sequence in sequences]
    predicted_P = np.concatenate([sequence.targets for sequence in sequences], dtype=np.int64)
    predicted_P += np.repeat(starts_N[: len(sequences)], num_targets)
    labels = _labels(micro_batch)
    arrays = [
        tokens_T,
        places_T[: micro_batch.padded_length],
        np.append(0, ends_N),
        predicted_P - 1,
        np.concatenate([own.tokens for own in labels], dtype=np.int64)
        if labels
        else tokens_T[predicted_P],
        np.repeat([sequence.task for sequence in sequences], num_targets),
    ]
    if labels:
        arrays.append(np.concatenate([own.weights for own in labels]).view(np.int64))
    if any(sequence.rollout is not None for sequence in sequences):
        arrays += _rollout_arrays(sequences)
    if any(sequence.num_answer for sequence in sequences):
        arrays += _example_arrays(sequences)
    if dropouts is not None:
        padding = [0] * (len(spans_N) - len(sequences))
        seeds_N = [sequence.noise_seed for sequence in sequences] + padding
        odds_N = [float(dropouts[sequence.task]) for sequence in sequences] + padding
        arrays += [
            token_keys(seeds_N, spans_N),
            np.repeat(np.array(odds_N, dtype=np.float64), spans_N).view(np.int64),
        ]
    return arrays


def _rollout_arrays(sequences: Sequence[TokenSequence]) -> list[IntArray]:
    """Return the places of targets that were sampled; logprobs, advantages and bounds of each."""
    sizes = [len(sequence.targets) for sequence in sequences]
    is_sampled = np.repeat([sequence.rollout is not None for sequence in sequences], sizes)
    own = [(one.rollout, len(one.targets)) for one in sequences if one.rollout is not None]
    floats = (
        [rollout.logprobs for rollout, _ in own],
        [rollout.advantages for rollout, _ in own],
        [np.full(size, rollout.clipping.low) for rollout, size in own],
        [np.full(size, rollout.clipping.high) for rollout, size in own],
    )
    return [np.flatnonzero(is_sampled), *(np.concatenate(part).view(np.int64) for part in floats)]


def _example_arrays(sequences: Sequence[TokenSequence]) -> list[IntArray]:
    """Return of every target its sequence and 1 if it is of the answer; then signs and answers."""
    sizes = np.array([len(sequence.targets) for sequence in sequences], dtype=np.int64)
    answers = np.array([sequence.num_answer for sequence in sequences], dtype=np.int64)
    places_P = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return [
        np.repeat(np.arange(len(sizes)), sizes),
        (places_P >= np.repeat(sizes - answers, sizes)).astype(np.int64),
        np.array([sequence.sign for sequence in sequences], dtype=np.int64),
        np.maximum(answers, 1),
    ]


def _labels(micro_batch: MicroBatch) -> list[Labels]:
    """Return the labels of all sequences; of an order's sequences all have them, or none."""
    return [one.labels for one in micro_batch.sequences if one.labels is not None]


def _spans(micro_batch: MicroBatch) -> IntArray:
    """Return int64 [N]: the tokens of every span."""
    length = micro_batch.padded_length
    spans = [length or len(sequence.tokens) for sequence in micro_batch.sequences]
    padding = micro_batch.padded_tokens - sum(spans)
    return np.array([*spans, padding] if padding else spans, dtype=np.int64)


def _tensors(
    micro_batch: MicroBatch,
    sent: Sequence[Tensor],
    task_weights: Tensor,
    dtype: torch.dtype,
    example_weights: Mapping[int, ExampleWeights],
) -> MicroBatchTensors:
    """Return a micro-batch's tensors, of what `_arrays` made and was sent."""
    tokens_T, positions_S, offsets_N, *rest = sent
    num_targets = 4 if _labels(micro_batch) else 3
    (positions_P, predicted_P, tasks_P, *factors), rest = rest[:num_targets], rest[num_targets:]
    factors_P = factors[0].view(torch.float64).to(kept_dtype(dtype)) if factors else None
    packing = noise = examples = rollouts = None
    if any(sequence.rollout is not None for sequence in micro_batch.sequences):
        places_R, *floats = rest[:5]
        kept = (own.view(torch.float64).to(kept_dtype(dtype)) for own in floats)
        rollouts = Rollouts(places_R, *kept)
        rest = rest[5:]
    if any(sequence.num_answer for sequence in micro_batch.sequences):
        sequence_P, *others = rest[:4]
        answer_P, signs_N, answers_N = (own.to(kept_dtype(dtype)) for own in others)
        of_tasks = task_examples(micro_batch.sequences, example_weights, signs_N)
        examples = Examples(sequence_P, answer_P, answers_N, of_tasks)
        rest = rest[4:]
    if micro_batch.padded_length is None:
        packing = Packing(tuple(_spans(micro_batch).tolist()), offsets_N.to(torch.int32))
    if rest:
        keys_T, odds_T = rest
        noise = TokenNoise.of_tokens(keys_T, odds_T.view(torch.float64), dtype)
    return MicroBatchTensors(
        tokens_T.view(-1, len(positions_S)),
        positions_S[None],
        Targets(
            positions_P,
            predicted_P,
            tasks_P,
            factors_P,
            rollouts,
            segments=_target_segments(micro_batch),
        ),
        tuple(len(sequence.tokens) for sequence in micro_batch.sequences),
        _segments(micro_batch),
        task_weights,
        packing,
        noise,
        examples,
    )


def _target_segments(micro_batch: MicroBatch) -> tuple[Segment, ...]:
    """Return the runs of targets of one task."""
    segments, stop = [], 0
    for number, own in groupby(micro_batch.sequences, lambda sequence: sequence.task):
        start, stop = stop, stop + sum(len(sequence.targets) for sequence in own)
        if start < stop:
            segments.append(Segment(number, start, stop))
    return tuple(segments)


def _segments(micro_batch: MicroBatch) -> tuple[Segment, ...]:
    """Return the runs of tokens of one task."""
    segments: list[Segment] = []
    spans = iter(_spans(micro_batch).tolist())
    stop = 0
    for number, own in groupby(sequence.task for sequence in micro_batch.sequences):
        start, stop = stop, stop + sum(next(spans) for _ in own)
        segments.append(Segment(number, start, stop))
    segments[-1] = Segment(segments[-1].number, segments[-1].start, stop + sum(spans))
    return tuple(segments)
