"""What a side of the comparison is: it trains a step's sequences and says how that went."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from benchmarks.sides.job import Job
from lobra.layout import sequences
from lobra.model.host_memory import keep_freed_memory

COMPUTE = "forward and backward"  # what sides call it, so that its launches can be told apart

Batch = list[sequences.Sequence]
Step = Sequence[sequences.Sequence]


@dataclass(frozen=True)
class Setting:
    """What a side is built for.

    Attributes
    ----------
    folder
        Of the base model.
    job
        What is trained.
    num_tasks, rank
        The adapters; alpha is the rank.
    device
        "cpu" or "cuda".
    """

    folder: Path
    job: Job
    num_tasks: int
    rank: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights."""
        return weights_dtype(self.device)


@dataclass(frozen=True)
class Trained:
    """How a step went.

    Attributes
    ----------
    time_s
        The whole step, updates included.
    compute_s
        Forward and backward passes, where the side does them before all updates; else `time_s`.
    losses
        Of every task the mean loss of its tokens, before the update.
    micro_batches, padded_tokens
        What was computed; padded tokens include the real ones.
    """

    time_s: float
    compute_s: float
    losses: tuple[float, ...]
    micro_batches: int
    padded_tokens: int


class Side(Protocol):
    """One way to train adapters, or the frozen base alone."""

    def train(self, step: Step) -> Trained:
        """Train a step's sequences, ordered by task."""


class Clock:
    """Seconds since it was made, all work given to the device included."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start_s = self._now_s()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self._now_s() - self.start_s

    def _now_s(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def alone_on(device: str) -> Iterator[None]:
    """Make this process the only rank of a world on the device, as long as the context lasts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    else:
        torch.cuda.set_device(0)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new shape, slowly
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def weights_dtype(device: str) -> torch.dtype:
    """Return what frozen weights are in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def sent(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return CPU tensors on the device; the host does not wait for a GPU to have them."""
    if device.type == "cpu":
        return list(tensors)
    return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]


def by_task(step: Step, num_tasks: int) -> list[Batch]:
    """Return each task's sequences."""
    found: list[Batch] = [[] for _ in range(num_tasks)]
    for sequence in step:
        found[sequence.task].append(sequence)
    return found


def num_labels(batch: Step) -> int:
    """Return how many tokens are learned."""
    return sum(len(sequence.targets) for sequence in batch)
