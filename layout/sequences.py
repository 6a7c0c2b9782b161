"""What a step trains: sequences, the micro-batches they make, and the order that carries both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]
Tokens = TypeVar("Tokens", int, IntArray)

PACKED_MULTIPLE = 16  # tensor cores take tokens in groups of it; below 1 % of padding from 1,600 on


@dataclass(frozen=True)
class Work:
    """What sequences ask of a replica, whatever their padding; the work of several is the sum.

    Attributes
    ----------
    tokens
        Their tokens: what linears and activations cost follows.
    squares
        The squares of their lengths, tokens^2: what attention costs follows.
    labels
        The tokens to be predicted: what the head and the loss cost follow.
    """

    tokens: int = 0
    squares: int = 0
    labels: int = 0

    def __add__(self, other: Work) -> Work:
        """Return the work of both."""
        return Work(
            self.tokens + other.tokens, self.squares + other.squares, self.labels + other.labels
        )


def total_work(works: Iterable[Work]) -> Work:
    """Return the sum; of nothing it is no work."""
    return sum(works, Work())


@dataclass(frozen=True, eq=False)
class Sequence:
    """A sequence of a task, and what is to be learned of it.

    Attributes
    ----------
    task
        The number of the task.
    index
        The sequence's place in the task's data.
    tokens
        int32 [S].
    targets
        int32 [T]: which tokens are to be predicted, each from those before it: places in
        ``tokens``, ascending, from 1 on, since nothing precedes the first.
    """

    task: int
    index: int
    tokens: TokenArray
    targets: TokenArray

    @property
    def work(self) -> Work:
        """What the sequence asks of a replica."""
        return Work(len(self.tokens), len(self.tokens) ** 2, len(self.targets))

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same sequence with the same content."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return (
            (self.task, self.index) == (other.task, other.index)
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.targets, other.targets)
        )

    def __hash__(self) -> int:
        """Return a hash of where the sequence is from."""
        return hash((self.task, self.index))


def packed_tokens(tokens: Tokens) -> Tokens:
    """Return how many tokens are computed where so many lie end to end."""
    return -(-tokens // PACKED_MULTIPLE) * PACKED_MULTIPLE


@dataclass(frozen=True)
class MicroBatch:
    """Sequences computed together, those of a task adjacent.

    Attributes
    ----------
    sequences
        Padded, each is a row; packed, they lie end to end.
    padded_length
        Tokens of a row, at least those of the longest sequence. None: packed.
    """

    sequences: tuple[Sequence, ...]
    padded_length: int | None = None

    @property
    def work(self) -> Work:
        """What the sequences ask of a replica, padding left out."""
        return total_work(sequence.work for sequence in self.sequences)

    @property
    def padded_tokens(self) -> int:
        """Tokens computed, padding included."""
        if self.padded_length is None:
            return packed_tokens(sum(len(sequence.tokens) for sequence in self.sequences))
        return self.padded_length * len(self.sequences)


@dataclass(frozen=True)
class StepOrder:
    """What every rank is told of a step: the only message from rank 0.

    Attributes
    ----------
    step
        The step, counted from 0.
    replicas
        Of every replica its micro-batches, in the order they are run.
    replica_time_s
        Of every replica the predicted seconds, its speed factor included.
    speed_factors
        Of every replica its measured time over the cost model's.
    sync_time_s
        What synchronising the adapters is predicted to take after the slowest replica.
    solve_time_s
        What dispatching the step took.
    stop
        Whether the run ends before this step.
    """

    step: int
    replicas: tuple[tuple[MicroBatch, ...], ...] = ()
    replica_time_s: tuple[float, ...] = ()
    speed_factors: tuple[float, ...] = ()
    sync_time_s: float = 0.0
    solve_time_s: float = 0.0
    stop: bool = False

    @cached_property
    def sequences(self) -> tuple[Sequence, ...]:
        """All sequences, replica by replica, micro-batch by micro-batch."""
        return tuple(
            sequence
            for micro_batches in self.replicas
            for micro_batch in micro_batches
            for sequence in micro_batch.sequences
        )

    @property
    def predicted_step_time_s(self) -> float:
        """The slowest replica's predicted time and the synchronisation's."""
        return max(self.replica_time_s) + self.sync_time_s

    @property
    def padded_tokens(self) -> int:
        """Tokens computed in the step, padding included."""
        return sum(batch.padded_tokens for replica in self.replicas for batch in replica)

    def task_work(self, num_tasks: int) -> tuple[Work, ...]:
        """Return each task's work; a task without a sequence has none."""
        works = [Work()] * num_tasks
        for sequence in self.sequences:
            works[sequence.task] += sequence.work
        return tuple(works)

    def encode(self) -> IntArray:
        """Return the order as one array, exactly: int64; times by their bits, tokens two a word."""
        micro_batches = [batch for replica in self.replicas for batch in replica]
        sequences = self.sequences
        times_s = [self.sync_time_s, self.solve_time_s, *self.replica_time_s, *self.speed_factors]
        return np.concatenate(
            [
                _integers([self.step, self.stop, len(self.replicas)]),
                _integers([len(micro_batches), len(sequences)]),
                np.array(times_s, dtype=np.float64).view(np.int64),
                _integers(len(replica) for replica in self.replicas),
                _integers(batch.padded_length or 0 for batch in micro_batches),
                _integers(len(batch.sequences) for batch in micro_batches),
                _integers(sequence.task for sequence in sequences),
                _integers(sequence.index for sequence in sequences),
                _integers(len(sequence.tokens) for sequence in sequences),
                _integers(len(sequence.targets) for sequence in sequences),
                _in_words([sequence.tokens for sequence in sequences]),
                _in_words([sequence.targets for sequence in sequences]),
            ]
        )

    @classmethod
    def decode(cls, flat: IntArray) -> StepOrder:
        """Return the order that `encode` made ``flat`` of; its tokens are views of it."""
        reader = _Reader(flat)
        step, stop, num_replicas, num_batches, num_sequences = reader.integers(5)
        sync_s, solve_s, *times_s = reader.take(2 + 2 * num_replicas).view(np.float64).tolist()
        batches_of_replica = reader.integers(num_replicas)
        padded_lengths = reader.integers(num_batches)
        rows_of_batch = reader.integers(num_batches)
        tasks, indices = reader.integers(num_sequences), reader.integers(num_sequences)
        num_tokens, num_targets = reader.integers(num_sequences), reader.integers(num_sequences)
        tokens, targets = reader.parts(num_tokens), reader.parts(num_targets)
        sequences = map(Sequence, tasks, indices, tokens, targets)
        micro_batches = [
            MicroBatch(tuple(islice(sequences, rows)), padded_length or None)
            for rows, padded_length in zip(rows_of_batch, padded_lengths, strict=True)
        ]
        rest = iter(micro_batches)
        return cls(
            step,
            tuple(tuple(islice(rest, count)) for count in batches_of_replica),
            replica_time_s=tuple(times_s[:num_replicas]),
            speed_factors=tuple(times_s[num_replicas:]),
            sync_time_s=sync_s,
            solve_time_s=solve_s,
            stop=bool(stop),
        )


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
