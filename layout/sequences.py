"""What a step trains: sequences, and the micro-batches they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
TokenArray = NDArray[np.int32]
FloatArray = NDArray[np.float64]
Tokens = TypeVar("Tokens", int, IntArray)

#: How a micro-batch holds its sequences: end to end, or each padded to the length of a bucket.
Batching = Literal["packed", "bucketed"]
BATCHINGS: tuple[Batching, ...] = get_args(Batching)

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
class Labels:
    """What is predicted at a sequence's targets, and what each counts for.

    Attributes
    ----------
    tokens
        int32 [T].
    weights
        float64 [T]: what the loss of each is multiplied by; of any sign.
    """

    tokens: TokenArray
    weights: FloatArray

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same, bit for bit but for the sign of zero."""
        if not isinstance(other, Labels):
            return NotImplemented
        return np.array_equal(self.tokens, other.tokens) and np.array_equal(
            self.weights, other.weights, equal_nan=True
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Clipping:
    """What a ratio is kept between."""

    low: float = 0.0
    high: float = float("inf")


@dataclass(frozen=True, eq=False)
class Rollout:
    """How a sequence's targets were sampled, and how good that was.

    Attributes
    ----------
    logprobs
        float64 [T]: of each target, by the policy that sampled it.
    advantages
        float64 [T].
    clipping
        Of the ratio of its probability now to that one.
    """

    logprobs: FloatArray
    advantages: FloatArray
    clipping: Clipping = Clipping()

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same, bit for bit but for the sign of zero."""
        if not isinstance(other, Rollout):
            return NotImplemented
        return self.clipping == other.clipping and all(
            np.array_equal(own, their, equal_nan=True)
            for own, their in (
                (self.logprobs, other.logprobs),
                (self.advantages, other.advantages),
            )
        )

    __hash__ = None  # type: ignore[assignment]


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
        ``tokens``, ascending, from 1 on, since nothing precedes the first. With ``labels`` the
        place behind the last token is a target too.
    noise_seed
        What its LoRA dropout follows from: of the task's seed, its own step and the sequence's
        place in the step's batch, so that it is the same whatever else is trained.
    labels
        Of the targets, where they are given. None: they are the sequence's own tokens and count
        alike.
    sign
        In an example of several sequences: 1 if its answer is wanted, -1 if not, 0 if it is there
        to be compared with only.
    num_answer
        In an example: how many of its targets, the last ones, are of its answer; else 0.
    rollout
        Of targets that were sampled and are learned by their advantages; else None.
    """

    task: int
    index: int
    tokens: TokenArray
    targets: TokenArray
    noise_seed: int = 0
    labels: Labels | None = None
    sign: int = 0
    num_answer: int = 0
    rollout: Rollout | None = None

    @property
    def is_compared(self) -> bool:
        """Whether the sequence is not learned: others of the step are compared with it."""
        return self.num_answer > 0 and self.sign == 0

    @property
    def work(self) -> Work:
        """What the sequence asks of a replica."""
        return Work(len(self.tokens), len(self.tokens) ** 2, len(self.targets))

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same sequence with the same content."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return (
            (self.task, self.index, self.noise_seed) == (other.task, other.index, other.noise_seed)
            and (self.sign, self.num_answer) == (other.sign, other.num_answer)
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.targets, other.targets)
            and self.labels == other.labels
            and self.rollout == other.rollout
        )

    def __hash__(self) -> int:
        """Return a hash of where the sequence is from."""
        return hash((self.task, self.index))


def packed_tokens(tokens: Tokens) -> Tokens:
    """Return how many tokens are computed where so many, of several sequences, lie end to end."""
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
        if self.padded_length is not None:
            return self.padded_length * len(self.sequences)
        tokens = sum(len(sequence.tokens) for sequence in self.sequences)
        # One alone may be as long as fits into memory: nothing is added to it.
        return packed_tokens(tokens) if len(self.sequences) > 1 else tokens
