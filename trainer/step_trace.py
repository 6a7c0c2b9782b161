"""torch's profiler on chosen steps: what each rank's processors did, as Chrome traces."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lobra.common.errors import ConfigError
from lobra.common.files import atomic_path

FOLDER = "torch_profiler"  # in the run's folder


def steps_of(text: str) -> frozenset[int]:
    """Return the steps of a list such as "3-5,9", counted from 1.

    Raises
    ------
    ConfigError
        It is none.
    """
    steps: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"--torch-profiler {text}: want steps, such as 3-5 or 3,7")
        steps.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(steps)


@contextmanager
def traced(run: Path, step: int, rank: int) -> Iterator[None]:
    """Write what this rank does in the block as the trace of a step (counted from 1)."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        yield
    with atomic_path(run / FOLDER / f"step_{step}_rank_{rank}.json.gz") as draft:
        profiler.export_chrome_trace(str(draft))
