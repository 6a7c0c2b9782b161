"""The sweep: what more or fewer GPUs would change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lobra.common.errors import ConfigError
from lobra.planner.deploy import deploy
from lobra.planner.deployment import Deployment, Options, as_json
from lobra.planner.outcome import Progress, silent
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

MOST_SIZES = 15
SIZE_LIMIT_S = 2.0
IN_JSON = ("plan", "num_gpus", "step_time_s", "gpu_seconds", "lower_bound_s", "gap", "homogeneous")


@dataclass(frozen=True)
class Sizing:
    """The best plan found on ``num_gpus`` GPUs, or the reason why there is none."""

    num_gpus: int
    deployment: Deployment | None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the sizing for ``--json``: ``num_gpus`` are those the plan uses."""
        if self.deployment is None:
            return {"gpus_available": self.num_gpus, "plan": None, "reason": self.reason}
        entry = as_json(self.deployment)
        return {"gpus_available": self.num_gpus, **{key: entry[key] for key in IN_JSON}}


def parse_range(text: str) -> list[int]:
    """Return the GPU counts of ``LOW:HIGH`` (about 15 of them) or ``LOW:HIGH:STEP``.

    Raises
    ------
    ConfigError
        If it is written otherwise, or is empty.
    """
    parts = text.split(":")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or numbers[0] < 1 or numbers[1] < numbers[0] or numbers[-1] < 1:
        raise ConfigError(f"--sweep-gpus: {text!r}; write LOW:HIGH or LOW:HIGH:STEP, as in 8:64:8")
    low, high = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else max(1, -(-(high - low) // (MOST_SIZES - 1)))
    return list(range(low, high + 1, step))


def sweep(
    workload: Workload,
    memory: MemoryProfile,
    cost_model: CostModel,
    gpus: Sequence[int],
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> list[Sizing]:
    """Plan for every number of GPUs, two seconds each unless a time limit is given."""
    if options.time_limit_s is None:
        options = replace(options, time_limit_s=SIZE_LIMIT_S)
    sizings = []
    for number in gpus:
        progress(f"{number} GPUs")
        try:
            found = deploy(workload, memory, cost_model, number, options, progress, refused)
            sizings.append(Sizing(number, found))
        except ConfigError as error:
            sizings.append(Sizing(number, None, str(error)))
    return sizings
