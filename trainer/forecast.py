"""How long a run still takes, at the rate of its steps so far.

Tasks leave a run one by one, so steps become shorter. What is left is therefore counted in
floating-point operations: those of a task's mean step, for each step it has left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from lobra.trainer.metrics import StepMetrics

WARM_UP_STEPS = 1  # the first step also pays for lazy initialisation
MEMORY = 0.95  # of what is known of the rates, kept with every step: about the last twenty count


@dataclass(frozen=True)
class TaskOutlook:
    """What a task has left of a run.

    Attributes
    ----------
    steps, steps_left
        Steps of its own that it has made, and that it is still to make.
    time_left_s
        Seconds until it has made them, at the measured rate.
    """

    steps: int
    steps_left: int
    time_left_s: float


@dataclass(frozen=True)
class Outlook:
    """What a run has left, after a step.

    Attributes
    ----------
    steps_left
        Steps until its end.
    time_left_s, predicted_left_s
        Seconds until its end, at the measured and at the predicted rate.
    tasks
        Of every task, by name.
    """

    steps_left: int
    time_left_s: float
    predicted_left_s: float
    tasks: Mapping[str, TaskOutlook]


@dataclass
class Forecast:
    """What is known of the steps so far.

    Attributes
    ----------
    flops, steps
        Of every task, by name, the operations of its steps, and how many these were.
    total_flops, measured_s, predicted_s
        Of the steps that rates are taken from, the older the less: their operations, and what they
        took, validation and checkpoints included, and were predicted to take.
    num_steps
        How many steps there were.
    """

    flops: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    total_flops: float = 0.0
    measured_s: float = 0.0
    predicted_s: float = 0.0
    num_steps: int = 0

    @property
    def pace(self) -> float:
        """What the steps took over what they were predicted to; 1 as long as there are none."""
        return self.measured_s / self.predicted_s if self.predicted_s else 1.0

    def add(self, step: StepMetrics) -> None:
        """Learn from a step."""
        for name, task in step.tasks.items():
            self.flops[name] += task.flops  # type: ignore[assignment]
            self.steps[name] += 1
        if self.num_steps == WARM_UP_STEPS:  # until there is another, better than nothing
            self.total_flops = self.measured_s = self.predicted_s = 0.0
        self.num_steps += 1
        time_s = step.step_time_s + step.validation_time_s + step.checkpoint_time_s
        self.total_flops = MEMORY * self.total_flops + step.flops
        self.measured_s = MEMORY * self.measured_s + time_s
        self.predicted_s = MEMORY * self.predicted_s + step.predicted_step_time_s

    def outlook(self, standing: Mapping[str, tuple[int, int]]) -> Outlook:
        """Return what is left, given the steps that every task has made and has left."""
        left = {name: steps_left for name, (_, steps_left) in standing.items()}
        steps_left = max(left.values(), default=0)
        share = self._share(steps_left, left)
        return Outlook(
            steps_left=steps_left,
            time_left_s=share * self.measured_s,
            predicted_left_s=share * self.predicted_s,
            tasks={
                name: TaskOutlook(
                    steps, left[name], self.measured_s * self._share(left[name], left)
                )
                for name, (steps, _) in standing.items()
            },
        )

    def _share(self, num_steps: int, left: Mapping[str, int]) -> float:
        """Return the operations of the next so many steps, over those of the steps known."""
        ahead = sum(
            self.flops[name] / self.steps[name] * min(steps_left, num_steps)
            for name, steps_left in left.items()
            if self.steps[name]
        )
        return ahead / self.total_flops if ahead else 0.0
