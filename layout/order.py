"""The one message to the ranks: what to compute, what to update, and what to do then."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import compress, islice, repeat
from typing import Any, Literal

import numpy as np

from lobra.layout.sequences import (
    Clipping,
    FloatArray,
    IntArray,
    Labels,
    MicroBatch,
    Rollout,
    Sequence,
    TokenArray,
    Work,
)
from lobra.tasks.objectives import SEQUENCES_OF_EXAMPLE


@dataclass(frozen=True)
class AdamSettings:
    """What AdamW does, beside its learning rate; the defaults are PyTorch's."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Update:
    """What a step does to a task's adapter; every rank leaves it out if the gradient is not finite.

    Attributes
    ----------
    task
        The number of the task.
    learning_rate
        The rate of this update.
    max_grad_norm
        The norm that a larger gradient is scaled down to; 0: none is.
    adam
        AdamW's settings from this update on; None: as they were.
    """

    task: int
    learning_rate: float
    max_grad_norm: float
    adam: AdamSettings | None = None


@dataclass(frozen=True)
class SlotOrder:
    """What becomes of a task's slot beside training.

    Attributes
    ----------
    action
        "install": the task gets a slot. "save": its adapter is written. "remove": its slot goes.
    task
        The number of the task.
    adapter
        To install: the fields of the adapter's `model.adapter.AdapterSpec`.
    config
        To install, in place of these: the fields of the task's `tasks.config.TaskConfig`.
    folder
        To install: where its weights are read from, in PEFT's format; empty: it starts fresh. To
        save: where they are written.
    moments
        Whether Adam's moments are read or written there too.
    updates
        To install with moments: how many updates they have seen.
    """

    action: Literal["install", "save", "remove"]
    task: int
    adapter: Mapping[str, Any] | None = None
    folder: str = ""
    moments: bool = False
    updates: int = 0
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StepOrder:
    """What every rank is told to do: the only message from rank 0.

    Slots are changed first. Sequences of a task that is updated are trained on, for the mean loss
    over their targets; of other tasks only the losses are found. Without any update there is no
    backward pass: so an evaluation is ordered. What is to be kept, exported, saved or ended is so
    after that, in this order.

    A step may also be ordered in parts: orders that accumulate, of sequences whose labels say what
    each target counts for, then one of the updates alone. The losses of labels are reported token
    by token.

    Attributes
    ----------
    step
        The step, counted from 0; without sequences, the steps made so far.
    replicas
        Of every replica its micro-batches, in the order they are run.
    updates
        The tasks that are updated, each with the gradient of its targets in the order's sequences;
        without any sequence, with what it has accumulated.
    slots
        The slots that are changed, or saved.
    accumulate
        Whether the sequences' gradients are added to those that their tasks have.
    keep
        The tasks whose adapters, as they are now, are kept as the best of theirs.
    export
        The tasks whose adapters are written as they are now.
    export_best
        The tasks of which the adapter that is kept is written.
    save
        Whether a checkpoint is written.
    stop
        Whether this is the last order.
    finished
        With ``stop``: whether all was trained that was asked for, or others go on with the rest.
    """

    step: int
    replicas: tuple[tuple[MicroBatch, ...], ...] = ()
    updates: tuple[Update, ...] = ()
    slots: tuple[SlotOrder, ...] = ()
    accumulate: bool = False
    keep: tuple[int, ...] = ()
    export: tuple[int, ...] = ()
    export_best: tuple[int, ...] = ()
    save: bool = False
    stop: bool = False
    finished: bool = False

    @cached_property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, replica by replica, micro-batch by micro-batch."""
        return tuple(
            sequence
            for micro_batches in self.replicas
            for micro_batch in micro_batches
            for sequence in micro_batch.sequences
        )

    @cached_property
    def work(self) -> Mapping[int, Work]:
        """The work of every task that has a sequence in the order, by number, ascending."""
        works: dict[int, Work] = {}
        for sequence in self.sequences:
            works[sequence.task] = works.get(sequence.task, Work()) + sequence.work
        return dict(sorted(works.items()))

    @cached_property
    def tasks(self) -> tuple[int, ...]:
        """The numbers of the tasks with sequences or updates, ascending."""
        return tuple(sorted({*self.work, *(update.task for update in self.updates)}))

    @cached_property
    def num_examples(self) -> dict[int, int]:
        """How many examples of several sequences the order has, of every task that has any."""
        counts = Counter(sequence.task for sequence in self.sequences if sequence.num_answer)
        return {task: count // SEQUENCES_OF_EXAMPLE for task, count in counts.items()}

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding included."""
        return sum(batch.padded_tokens for replica in self.replicas for batch in replica)

    @cached_property
    def encoded(self) -> IntArray:
        """The order as one array, exactly: int64; rates by their bits, tokens two a word."""
        micro_batches = [batch for replica in self.replicas for batch in replica]
        sequences = self.sequences
        labels = [sequence.labels for sequence in sequences if sequence.labels is not None]
        assert len(labels) in (0, len(sequences)), "all sequences of an order have labels, or none"
        rollouts = [sequence.rollout for sequence in sequences if sequence.rollout is not None]
        slots = json.dumps([asdict(slot) for slot in self.slots]).encode()
        return np.concatenate(
            [
                _integers([self.step, self.accumulate, self.save, self.stop, self.finished]),
                _integers([len(self.keep), len(self.export), len(self.export_best)]),
                _integers([len(self.updates), len(self.replicas)]),
                _integers([len(micro_batches), len(sequences), len(labels), len(slots)]),
                _integers([*self.keep, *self.export, *self.export_best]),
                _integers(update.task for update in self.updates),
                _integers(update.adam is not None for update in self.updates),
                np.array([_numbers(update) for update in self.updates]).flatten().view(np.int64),
                _integers(len(replica) for replica in self.replicas),
                _integers(batch.padded_length or 0 for batch in micro_batches),
                _integers(len(batch.sequences) for batch in micro_batches),
                _integers(sequence.task for sequence in sequences),
                _integers(sequence.index for sequence in sequences),
                _integers(sequence.noise_seed for sequence in sequences),
                _integers(sequence.sign for sequence in sequences),
                _integers(sequence.num_answer for sequence in sequences),
                _integers(sequence.rollout is not None for sequence in sequences),
                _integers(len(sequence.tokens) for sequence in sequences),
                _integers(len(sequence.targets) for sequence in sequences),
                _in_words([sequence.tokens for sequence in sequences]),
                _in_words([sequence.targets for sequence in sequences]),
                _in_words([own.tokens for own in labels]),
                *(own.weights.view(np.int64) for own in labels),
                *(_rollout_floats(own).view(np.int64) for own in rollouts),
                np.frombuffer(slots.ljust(-(-len(slots) // 8) * 8), dtype=np.int64),
            ]
        )

    @classmethod
    def decode(cls, flat: IntArray) -> StepOrder:
        """Return the order that `encoded` is ``flat``; its tokens are views of it."""
        reader = _Reader(flat)
        step, accumulate, save, stop, finished = reader.integers(5)
        num_tasks = reader.integers(3)
        num_updates, num_replicas = reader.integers(2)
        num_batches, num_sequences, num_labels, slot_bytes = reader.integers(4)
        keep, export, export_best = (tuple(reader.integers(num)) for num in num_tasks)
        updated, has_adam = reader.integers(num_updates), reader.integers(num_updates)
        numbers = reader.take(6 * num_updates).view(np.float64).reshape(-1, 6).tolist()
        batches_of_replica = reader.integers(num_replicas)
        padded_lengths = reader.integers(num_batches)
        rows_of_batch = reader.integers(num_batches)
        tasks, indices = reader.integers(num_sequences), reader.integers(num_sequences)
        noise_seeds = reader.integers(num_sequences)
        signs, num_answers = reader.integers(num_sequences), reader.integers(num_sequences)
        has_rollout = reader.integers(num_sequences)
        num_tokens, num_targets = reader.integers(num_sequences), reader.integers(num_sequences)
        tokens, targets = reader.parts(num_tokens), reader.parts(num_targets)
        labels: Iterable[Labels | None] = repeat(None)
        if num_labels:
            predicted = reader.parts(num_targets)
            weights = [reader.take(count).view(np.float64) for count in num_targets]
            labels = map(Labels, predicted, weights)
        sampled = iter([_rollout(reader, count) for count in compress(num_targets, has_rollout)])
        rollouts = [next(sampled) if given else None for given in has_rollout]
        slots = reader.take(-(-slot_bytes // 8)).tobytes()
        sequences = map(
            Sequence, tasks, indices, tokens, targets, noise_seeds, labels, signs, num_answers,
            rollouts,
        )  # fmt: skip
        micro_batches = iter(
            [
                MicroBatch(tuple(islice(sequences, rows)), padded_length or None)
                for rows, padded_length in zip(rows_of_batch, padded_lengths, strict=True)
            ]
        )
        return cls(
            step,
            tuple(tuple(islice(micro_batches, count)) for count in batches_of_replica),
            tuple(
                Update(task, rate, norm, AdamSettings(*adam) if given else None)
                for task, given, (rate, norm, *adam) in zip(updated, has_adam, numbers, strict=True)
            ),
            tuple(SlotOrder(**entry) for entry in json.loads(slots)),
            accumulate=bool(accumulate),
            keep=keep,
            export=export,
            export_best=export_best,
            save=bool(save),
            stop=bool(stop),
            finished=bool(finished),
        )


def _numbers(update: Update) -> list[float]:
    """Return all of an update's numbers but its task's."""
    adam = update.adam or AdamSettings()
    own = [update.learning_rate, update.max_grad_norm]
    return [*own, adam.beta1, adam.beta2, adam.eps, adam.weight_decay]


def _rollout_floats(rollout: Rollout) -> FloatArray:
    bounds = [rollout.clipping.low, rollout.clipping.high]
    return np.concatenate([bounds, rollout.logprobs, rollout.advantages])


def _rollout(reader: _Reader, num_targets: int) -> Rollout:
    """Return the rollout that `_rollout_floats` laid end to end."""
    low, high = reader.take(2).view(np.float64).tolist()
    logprobs, advantages = reader.take(2 * num_targets).view(np.float64).reshape(2, -1)
    return Rollout(logprobs, advantages, Clipping(low, high))


def _integers(values: Iterable[int]) -> IntArray:
    return np.fromiter(values, dtype=np.int64)


def _in_words(parts: list[TokenArray]) -> IntArray:
    """Return int32 arrays end to end, two values an int64."""
    total = sum(map(len, parts))
    whole = np.zeros(total + total % 2, dtype=np.int32)
    if parts:
        np.concatenate(parts, out=whole[:total])
    return whole.view(np.int64)


class _Reader:
    """Reads an array from its start on."""

    def __init__(self, flat: IntArray) -> None:
        self.flat = flat
        self.place = 0

    def take(self, size: int) -> IntArray:
        """Return the next values."""
        self.place += size
        return self.flat[self.place - size : self.place]

    def integers(self, size: int) -> list[int]:
        """Return the next values as Python's."""
        values: list[int] = self.take(size).tolist()
        return values

    def parts(self, sizes: list[int]) -> list[TokenArray]:
        """Return int32 arrays of these sizes that `_in_words` laid end to end."""
        total = sum(sizes)
        whole = self.take((total + 1) // 2).view(np.int32)
        ends = np.cumsum(sizes, dtype=np.int64).tolist()
        return [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]
