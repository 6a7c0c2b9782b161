"""Peak memory and time of the loss: all tokens' logits at once against a few tokens at a time.

Both compute the cross-entropy of random hidden states under a frozen head and its gradient with
respect to them: torch's own on the whole logits, and the trainer's, some tokens after others. Each
runs in a process of its own; the peak is what the process's resident memory rose by (CPU), or what
the allocator had at most (GPU).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal

import torch
from torch.nn import functional

from lobra.model.head import VocabParallelHead
from lobra.model.precision import DTYPES
from lobra.profiler.peak_memory import peak_bytes_of

MIB = 1 << 20


def loss_memory(
    *,
    tokens: int = 4096,
    hidden: int = 1024,
    vocab: int = 32000,
    precision: Literal["fp32", "bf16"] = "fp32",
    device: Literal["cpu", "cuda"] = "cpu",
) -> Iterator[dict[str, Any]]:
    """Measure the loss of random hidden states [tokens, hidden] under a head of ``vocab`` rows."""
    for logits in ("whole", "in parts"):
        with ProcessPoolExecutor(1, get_context("spawn")) as alone:
            row = alone.submit(measured, logits, tokens, hidden, vocab, precision, device)
            yield row.result()


def measured(
    logits: str, tokens: int, hidden: int, vocab: int, precision: str, device: str
) -> dict[str, Any]:
    """Return the row of one way to compute the logits."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[precision]
    states = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    weight = (0.02 * torch.randn(vocab, hidden, generator=generator)).to(device, dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator).to(device)
    states.requires_grad_(True)
    compute = {"whole": _whole, "in parts": _in_parts}[logits]
    compute(states[:16], weight, targets[:16]).backward()  # libraries load on first use
    states.grad = None
    begin = time.perf_counter()
    peak_bytes = peak_bytes_of(lambda: compute(states, weight, targets).backward(), device)
    assert states.grad is not None
    return {
        "logits": logits,
        "peak MiB": round(peak_bytes / MIB),
        "seconds": time.perf_counter() - begin,
        "gradient norm": float(states.grad.float().norm()),
    }


def _whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, targets, reduction="mean")


def _in_parts(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    factors = torch.full((len(targets),), 1.0 / len(targets), device=hidden.device)
    head = VocabParallelHead(weight, range(len(weight)), None, len(weight))
    return (head.losses(hidden, targets) * factors).sum()
