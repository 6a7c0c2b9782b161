"""How long a function takes that all ranks run together: repeated, robust, agreed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lobra.profiler.effort import THOROUGH, Effort

MAX_REPEATS = 30
APART = 0.1  # two repeats of a function that differ by more ask for a third


@dataclass(frozen=True)
class Timing:
    """A robust time: the median in ms, and the interquartile range as a share of it."""

    time_ms: float
    spread: float
    repeats: int

    def details(self, modelled_ms: float | None = None) -> dict[str, Any]:
        """Return what the sidecar keeps of it; ``modelled_ms`` of collectives come on top."""
        details: dict[str, Any] = {"spread": round(self.spread, 4), "repeats": self.repeats}
        if modelled_ms is not None:
            details["modelled_collectives_ms"] = round(modelled_ms, 6)
        return details


def measured_timing(
    runs: Sequence[Callable[[], None]],
    device: torch.device,
    effort: Effort = THOROUGH,
    share: float = 1.0,
) -> Timing:
    """Time collective functions: warm-up, then as many repeats as rank 0 finds worthwhile.

    Of each function a rank takes the median of its repeats, of these the mean over functions and
    over ranks; it is returned everywhere. The repeats take about the effort's seconds together, or
    a ``share`` of them.
    """

    def repeat() -> list[float]:
        return [1e3 * _timed(run, device) for run in runs]

    # The functions differ in whose rows they run, which only an accelerator has to get ready for.
    for run in runs if device.type == "cuda" else runs[:1]:
        run()
    _wait(device)
    _meet(device)
    times_ms = [repeat()]
    least = effort.least if len(runs) == 1 else effort.least_of_mixture
    most = max(least, MAX_REPEATS // len(runs))
    timed_s = share * effort.timed_s
    repeats = int(np.clip(timed_s / max(1e-3 * sum(times_ms[0]), 1e-6), least, most))
    chosen = torch.tensor([repeats], device=device)
    dist.broadcast(chosen, src=0)
    repeats = int(chosen.item())
    _meet(device)
    times_ms += [repeat() for _ in range(repeats - 1)]
    if repeats == 2:  # whose median is their mean: a third tells which of two is wrong
        apart = max(max(pair) / min(pair) - 1.0 for pair in zip(*times_ms, strict=True))
        furthest = torch.tensor([apart], dtype=torch.float32, device=device)
        dist.all_reduce(furthest, op=dist.ReduceOp.MAX)
        if float(furthest) > APART:
            times_ms.append(repeat())
    low, median, high = np.percentile(times_ms, (25, 50, 75), axis=0)
    spread = float(((high - low) / median).mean())
    statistics = torch.tensor([median.mean(), spread], dtype=torch.float32, device=device)
    dist.all_reduce(statistics)
    statistics /= dist.get_world_size()
    return Timing(float(statistics[0]), float(statistics[1]), len(times_ms) * len(runs))


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Return the seconds one run takes."""
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _meet(device: torch.device) -> None:
    """Wait for all ranks; each says its device, which torch else guesses with a warning."""
    dist.barrier(device_ids=None if device.index is None else [device.index])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
