"""A step that was trained: what was ordered and expected, and what the ranks reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lobra.layout.order import StepOrder
from lobra.layout.sequences import Work, total_work
from lobra.layout.shapes import ModelShape
from lobra.layout.world import World
from lobra.profiler.flops import training_flops
from lobra.tasks.config import TaskConfig
from lobra.tasks.objectives import CIT, PAIRED
from lobra.trainer.evaluation import Evaluation
from lobra.trainer.ledger import drawn_batches
from lobra.trainer.metrics import ReplicaMetrics, StepMetrics, TaskMetrics
from lobra.trainer.orders import DispatchedStep
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.step_report import StepReport
from lobra.trainer.task_progress import RunTask


@dataclass(frozen=True)
class TrainedStep:
    """A step after it was trained.

    Attributes
    ----------
    own_steps
        By the number of every task that took part its own step, counted from 0.
    dispatched
        The order, and what was expected of it.
    report
        What the ranks reported.
    dispatch_wait_s
        What rank 0 waited for the order.
    step_time_s
        What the whole step took on rank 0.
    """

    own_steps: Mapping[int, int]
    dispatched: DispatchedStep
    report: StepReport
    dispatch_wait_s: float
    step_time_s: float

    @cached_property
    def losses(self) -> dict[int, float]:
        """The mean loss of every task with targets (`mean_losses`)."""
        return mean_losses(self.dispatched.order, self.report)

    def busy_s(self, world: World) -> list[float]:
        """Return the seconds that each replica computed: its busiest rank's."""
        return [
            max(self.report.busy_s[rank] for rank in world.ranks(replica))
            for replica in range(len(world.replicas))
        ]

    @property
    def plain_time_s(self) -> list[float]:
        """Of every replica the predicted seconds without its speed factor."""
        known = self.dispatched
        plain_s: list[float] = np.divide(known.replica_time_s, known.speed_factors).tolist()
        return plain_s

    def metrics(
        self,
        run: RunSpec,
        shape: ModelShape,
        tasks: Mapping[int, RunTask],
        evaluation: Evaluation,
        peak_flops_per_s: float | None,
    ) -> StepMetrics:
        """Return what is written of the step, without what comes after its evaluation.

        Parameters
        ----------
        run
            The run.
        shape
            The base model.
        tasks
            The tasks by number, as they are after it.
        evaluation
            That of the periods which end with the step.
        peak_flops_per_s
            What one GPU can do in a second, None where that is not known.
        """
        report, order = self.report, self.dispatched.order
        tokens = total_work(order.work.values()).tokens
        gpu_seconds = self.step_time_s * run.world.num_ranks
        flops = {n: _flops(tasks[n].config, shape, work) for n, work in order.work.items()}
        total_flops = sum(flops.values())
        # Ready before the slowest rank was, rank 0 waited for it inside the reduction.
        waited_s = max(0.0, min(report.reduce_s, max(report.arrival_s) - report.arrival_s[0]))
        return StepMetrics(
            step=order.step,
            step_time_s=self.step_time_s,
            predicted_step_time_s=self.dispatched.predicted_step_time_s,
            dispatch_time_s=self.dispatched.solve_time_s,
            dispatch_wait_s=self.dispatch_wait_s,
            prepare_time_s=report.prepare_s,
            replica_wait_s=waited_s,
            reduce_time_s=report.reduce_s - waited_s,
            optimizer_time_s=report.optimizer_s,
            tokens=tokens,
            padded_tokens=order.padded_tokens,
            gpu_seconds=gpu_seconds,
            memory_bytes=max((*report.memory_bytes, *evaluation.memory_bytes)),
            tasks=self._task_metrics(tasks, evaluation, flops),
            drawn=drawn_batches(order, self.own_steps, tasks),
            replicas=self._replica_metrics(run.world),
            validation_time_s=evaluation.time_s,
            plan_from=run.plan_from,
            tokens_per_s=tokens / self.step_time_s,
            flops=total_flops,
            mfu=total_flops / (gpu_seconds * peak_flops_per_s) if peak_flops_per_s else None,
        )

    def _task_metrics(
        self, tasks: Mapping[int, RunTask], evaluation: Evaluation, flops: Mapping[int, float]
    ) -> dict[str, TaskMetrics]:
        order = self.dispatched.order
        num_sequences = Counter(sequence.task for sequence in order.sequences)
        return {
            tasks[update.task].config.name: TaskMetrics(
                loss=self.losses[update.task],
                tokens=order.work[update.task].labels,
                sequences=num_sequences[update.task],
                grad_norm=self.report.grad_norms[update.task],
                lr=update.learning_rate,
                applied=self.report.is_applied(update.task),
                own_step=self.own_steps[update.task],
                validation_loss=evaluation.losses.get(update.task),
                stopped=tasks[update.task].progress.stopped,
                flops=flops[update.task],
                preferences=preferences(
                    tasks[update.task].config.objective, self.report.outcomes.get(update.task)
                ),
            )
            for update in order.updates
        }

    def _replica_metrics(self, world: World) -> list[ReplicaMetrics]:
        known = self.dispatched
        values = zip(
            world.layouts, self.busy_s(world), known.replica_time_s, known.speed_factors,
            known.order.replicas, strict=True,
        )  # fmt: skip
        return [
            ReplicaMetrics(
                layout=str(layout),
                busy_s=busy_s,
                predicted_s=predicted_s,
                speed_factor=speed_factor,
                micro_batches=len(micro_batches),
                padded_tokens=sum(batch.padded_tokens for batch in micro_batches),
            )
            for layout, busy_s, predicted_s, speed_factor, micro_batches in values
        ]


def _flops(task: TaskConfig, shape: ModelShape, work: Work) -> float:
    if task.trains_model:
        return training_flops(shape, work, 0, (), trains_base=True)
    return training_flops(shape, work, task.rank, task.target_modules)


def mean_losses(order: StepOrder, report: StepReport) -> dict[int, float]:
    """Return the mean loss per target token of every task that has any in the order."""
    return {
        number: report.losses[number] / (1 if number in order.num_examples else work.labels)
        for number, work in order.work.items()
        if work.labels
    }


def preferences(objective: str, outcomes: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return what a step's examples of a task have in its log, by TRL's names; None without any.

    Means over the answers that are wanted or not, left out where there are none; of pairs the share
    in which the chosen answer has the higher reward; of KTO the divergence; of CIT the contrast of
    pairs and what that counts for beside the tokens' loss.
    """
    if outcomes is None:
        return None
    if objective == CIT:
        return {name: outcomes[name] for name in ("contrast", "contrast_weight")}
    found = {}
    for side in ("chosen", "rejected"):
        if count := outcomes[f"num_{side}"]:
            found[f"rewards/{side}"] = outcomes[f"rewards_{side}"] / count
            found[f"logps/{side}"] = outcomes[f"logps_{side}"] / count
    if "rewards/chosen" in found and "rewards/rejected" in found:
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if objective in PAIRED:
        found["rewards/accuracies"] = outcomes["num_right"] / outcomes["num_chosen"]
    else:
        found["kl"] = outcomes["kl"]
    return found
