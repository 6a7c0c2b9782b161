"""The sweep: what more or fewer GPUs, another accelerator or another context limit would change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.common.models import NumGpus, refusal
from lobra.planner.deploy import deploy
from lobra.planner.deployment import Deployment, Options, as_json
from lobra.planner.outcome import Progress, silent
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile

MOST_SIZES = 15
MATTERS = 0.02  # how much faster another plan may be, at most, before a row says so
SIZE_LIMIT_S = 2.0
IN_JSON = (
    *("plan", "num_gpus", "step_time_s", "gpu_seconds", "lower_bound_s", "gap", "homogeneous"),
    *("complete", "sampled"),
)
SECONDS_PER_HOUR, MILLION = 3600.0, 1e6


@dataclass(frozen=True, eq=False)
class Hardware:
    """GPUs of one kind: what the model costs on them, what fits, and their price where known.

    ``name`` is that of the accelerator; empty: those that the profiles are of.
    """

    name: str
    cost_model: CostModel
    memory: MemoryProfile
    price_per_hour: float | None = None


@dataclass(frozen=True, eq=False)
class Sizing:
    """The best plan found on ``num_gpus`` GPUs, or the reason why there is none.

    Attributes
    ----------
    num_gpus
        GPUs there are.
    deployment
        The plan; None: there is none.
    reason
        Why there is none.
    hardware
        What the GPUs are.
    context
        Tokens that sequences are cut to; None: as they are.
    cut_share
        The share of the sequences that this cuts.
    tokens_per_step
        Of a step in which all tasks train, on average.
    """

    num_gpus: int
    deployment: Deployment | None
    reason: str = ""
    hardware: Hardware | None = None
    context: int | None = None
    cut_share: float = 0.0
    tokens_per_step: float = 0.0

    @property
    def accelerator(self) -> str:
        """The accelerator's name; empty: that of the profiles."""
        return "" if self.hardware is None else self.hardware.name

    @property
    def is_stopped(self) -> bool:
        """Whether the time limit ended the search while another plan could be much faster."""
        found = self.deployment
        return found is not None and not found.outcome.complete and found.sampled.gap > MATTERS

    @property
    def cost_per_million_tokens(self) -> float | None:
        """The price of training a million tokens, in its currency; None where it is not known."""
        price = None if self.hardware is None else self.hardware.price_per_hour
        if self.deployment is None or price is None or not self.tokens_per_step:
            return None
        gpu_hours = self.deployment.sampled.mean_gpu_seconds / SECONDS_PER_HOUR
        return price * gpu_hours / self.tokens_per_step * MILLION

    def as_json(self) -> dict[str, Any]:
        """Return the sizing for ``--json``: ``num_gpus`` are those the plan uses."""
        where: dict[str, Any] = {"gpus_available": self.num_gpus}
        if self.accelerator:
            where["accelerator"] = self.accelerator
        if self.context is not None:
            where |= {"context": self.context, "cut_share": round(self.cut_share, 6)}
        if self.deployment is None:
            return {**where, "plan": None, "reason": self.reason}
        entry = as_json(self.deployment)
        found = {**where, **{key: entry[key] for key in IN_JSON}}
        found |= {
            "mean_step_time_s": self.deployment.sampled.mean_step_time_s,
            "mean_gpu_seconds": self.deployment.sampled.mean_gpu_seconds,
            "tokens_per_step": round(self.tokens_per_step, 1),
        }
        if self.cost_per_million_tokens is not None:
            found["cost_per_million_tokens"] = self.cost_per_million_tokens
        return found


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
    good = len(numbers) in (2, 3) and 1 <= numbers[0] <= numbers[1] and numbers[-1] >= 1
    if not good or refusal(NumGpus, numbers[1]):
        raise ConfigError(f"--sweep-gpus: {text!r}; write LOW:HIGH or LOW:HIGH:STEP, as in 8:64:8")
    low, high = numbers[:2]
    step = numbers[2] if len(numbers) == 3 else max(1, -(-(high - low) // (MOST_SIZES - 1)))
    return list(range(low, high + 1, step))


def sweep(
    workload: Workload,
    hardware: Sequence[Hardware],
    gpus: Sequence[int],
    contexts: Sequence[int | None],
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> list[Sizing]:
    """Plan for every combination, two seconds of processor time each by default."""
    if options.time_limit_s is None:
        options = replace(options, time_limit_s=SIZE_LIMIT_S, limits_processor=True)

    def told(words: str) -> Progress:
        progress(words)
        return lambda message: progress(f"{words}: {message}")

    sizings = []
    cases = list(product(hardware, contexts, gpus))
    for number, (own, context, num_gpus) in enumerate(cases, 1):
        limit = "" if context is None else f", sequences of {context} tokens at most"
        words = f"{number} of {len(cases)}: {num_gpus} GPUs{own.name and ' '}{own.name}{limit}"
        shorter, cut_share = cut_to(workload, context)
        sizing = Sizing(num_gpus, None, "", own, context, cut_share, tokens_per_step(shorter))
        try:
            found = deploy(
                shorter, own.memory, own.cost_model, num_gpus, options, told(words), refused
            )
            sizings.append(replace(sizing, deployment=found))
        except ConfigError as error:
            sizings.append(replace(sizing, reason=str(error)))
    return sizings


def cut_to(workload: Workload, context: int | None) -> tuple[Workload, float]:
    """Return the workload with sequences cut to a number of tokens, and the share that is cut."""
    if context is None:
        return workload, 0.0

    def cut(lengths: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {task: np.minimum(values, context) for task, values in lengths.items()}

    longer = [float((own > context).mean()) for own in workload.lengths.values()]
    cut_share = float(np.average(longer, weights=[*workload.batch_sizes.values()]))
    shorter = replace(workload, lengths=cut(workload.lengths), held_out=cut(workload.held_out))
    return shorter, cut_share


def tokens_per_step(workload: Workload) -> float:
    """Return the tokens of a step in which all tasks train, on average."""
    return sum(
        workload.batch_sizes[task] * float(lengths.mean())
        for task, lengths in workload.lengths.items()
    )
