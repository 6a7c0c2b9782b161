"""The plans a run has had: after a resume on another one, replica numbers mean something else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from lobra.trainer.run_config import RunConfig


@dataclass(frozen=True)
class PlanPart:
    """Consecutive steps of a run on one plan.

    `number` counts from 1; `plan` in LobRA's notation; `steps` are lines of metrics.jsonl, at
    least one.
    """

    number: int
    plan: str
    num_gpus: int
    steps: tuple[dict[str, Any], ...]

    @property
    def layouts(self) -> list[str]:
        """Return the layout of every replica."""
        return [replica["layout"] for replica in self.steps[0]["replicas"]]

    @property
    def span(self) -> str:
        """Return its steps as a person counts them, such as "steps 1-5"."""
        first, last = self.steps[0]["step"] + 1, self.steps[-1]["step"] + 1
        return f"step {first}" if first == last else f"steps {first}-{last}"

    @property
    def title(self) -> str:
        """Return which plan this is, and of which steps."""
        return f"plan {self.number}, {self.span}: {self.plan}"


def plan_parts(config: RunConfig, steps: Sequence[dict[str, Any]]) -> list[PlanPart]:
    """Return the steps divided by the plan they ran under.

    A step's line names the entry of `plans` in config.yaml by its first step. Lines of older
    versions do not: they belong to the entry whose steps they are, and to another plan where the
    replicas' layouts change.
    """
    plans = {period.from_step: period.as_plan() for period in config.periods}

    def key(step: dict[str, Any]) -> tuple[int | None, tuple[str, ...]]:
        known = [start for start in plans if start <= step["step"]]
        start = step.get("plan_from", max(known, default=None))
        return start, tuple(replica["layout"] for replica in step["replicas"])

    parts: list[PlanPart] = []
    for (start, layouts), own in groupby(steps, key):
        text = _counted(layouts)
        plan = plans.get(start) if start is not None else None
        # What was measured has the last word: a line may be older than the entry.
        if plan and len(plan.replicas) == len(layouts):
            text = str(plan)
        num_gpus = sum(_num_gpus(layout) for layout in layouts)
        parts.append(PlanPart(len(parts) + 1, text, num_gpus, tuple(own)))
    return parts


def _counted(layouts: Sequence[str]) -> str:
    """Return equal neighbours counted: <1,1>x2 <2,1>x1."""
    return " ".join(f"{layout}x{len(list(same))}" for layout, same in groupby(layouts))


def _num_gpus(layout: str) -> int:
    product = 1
    for size in re.findall(r"\d+", layout):
        product *= int(size)
    return product
