"""torch's profiler on chosen steps: what each rank's processors did, as Chrome traces."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lobra.common.errors import ConfigError
from lobra.common.files import atomic_path

FOLDER = "torch_profiler"  # in the run's folder
MOST_STEPS = 1000  # each writes a trace of megabytes a rank

log = logging.getLogger(__name__)


def steps_of(text: str) -> frozenset[int]:
    """Return the steps of a list such as "3-5,9", counted from 1.

    Raises
    ------
    ConfigError
        It is none, or of more than `MOST_STEPS`.
    """
    steps: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{0,17})(?:-([1-9]\d{0,17}))?", part.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"--torch-profiler {text}: want steps, such as 3-5 or 3,7")
        own = range(int(match[1]), int(match[2] or match[1]) + 1)
        steps.update(own[: MOST_STEPS + 1])
        if len(steps) > MOST_STEPS:
            raise ConfigError(f"--torch-profiler {text}: want at most {MOST_STEPS} steps")
    return frozenset(steps)


@contextmanager
def traced(run: Path, step: int, rank: int) -> Iterator[None]:
    """Write what this rank does in the block as the trace of a step (counted from 1)."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        yield
    path = run / FOLDER / f"step_{step}_rank_{rank}.json.gz"
    try:
        with atomic_path(path) as draft:
            profiler.export_chrome_trace(str(draft))
    except (OSError, RuntimeError) as error:  # no reason to end a run
        log.warning("%s: cannot be written (%s)", path, error)
