"""Whether a run whose tasks have changed is to go on on another plan: when that pays.

What a switch gains is what the steps that are left take less, predicted, at the pace of the steps
so far. What it costs is what the last one took or, before the first, what starting and saving took.
A plan that is better only for a while, until tasks end, has to be left again: that costs twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.common.models import FileModel, load_as
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching
from lobra.planner.workload import Workload
from lobra.profiler.capacity import fitted_to
from lobra.profiler.lookup import no_memory_profile, own_memory_path
from lobra.tasks.config import TaskConfig
from lobra.tasks.kinds import ADAMW_8BIT
from lobra.trainer.admission import base_shape
from lobra.trainer.evaluation import held_out_data
from lobra.trainer.proposal import PlanningJob, PlanningProcess, Proposal, propose
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_spec import Admission, RunSpec
from lobra.trainer.task_progress import RunTask

log = logging.getLogger(__name__)

FILE = "replans.json"  # in a run's folder: every decision


@dataclass(frozen=True)
class Replan(FileModel):
    """A decision whether to go on on another plan.

    Attributes
    ----------
    step
        After how many steps of the run.
    present, proposed
        The plans.
    num_steps
        For how many steps the proposed plan is better by most: all that are left, or fewer.
    present_step_s, proposed_step_s
        What these take on average, at the pace of the steps so far.
    gain_s, cost_s
        What they take less on the proposed plan, and what switching was expected to take; and
        switching again, if they are not all.
    switched
        Whether the run went on on the proposed plan.
    decided_at
        When, in seconds since 1970.
    pause_s
        What switching took, from this decision to the next step.
    reason
        Which GPUs are lost or back, so that the run goes on on the other plan whatever that costs
        (0 here); times are as predicted. None: none are.
    """

    step: int
    present: str
    proposed: str
    num_steps: int
    present_step_s: float
    proposed_step_s: float
    gain_s: float
    cost_s: float
    switched: bool
    decided_at: float
    pause_s: float | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return (
                f"{self.reason}: the run goes on on {self.proposed} instead of {self.present}; "
                f"a step takes {self.proposed_step_s:.3g} s instead of {self.present_step_s:.3g} s "
                f"by prediction"
            )
        what = "the run goes on on another plan" if self.switched else "the plan stays as it is"
        return (
            f"{what}: {self.proposed} instead of {self.present} gains {self.gain_s:.1f} s in the "
            f"next {self.num_steps} steps, switching costs {self.cost_s:.1f} s"
        )


def read_replans(run: Path) -> list[Replan]:
    """Return a run's decisions so far; none, with a warning, where their file is damaged."""
    path = run / FILE
    if not path.is_file():
        return []
    try:
        return list(load_as(tuple[Replan, ...], path))
    except ConfigError as error:
        log.warning("what was decided about plans so far is not known: %s", error)
        return []


def _write_replans(run: Path, replans: Sequence[Replan]) -> None:
    try:
        write_atomic(run / FILE, json.dumps([asdict(one) for one in replans], indent=1) + "\n")
    except OSError as error:  # no reason to end a run
        log.warning("%s: cannot be written (%s)", run / FILE, error.strerror)


def note_move(run: Path, proposal: Proposal, present: Plan, step: int, reason: str) -> Replan:
    """Return, and note in a run's folder, that it goes on on another plan as its GPUs are others.

    Parameters
    ----------
    run
        The folder.
    proposal, present
        The plan, beside the one it has.
    step
        The steps made.
    reason
        Which are lost or back.
    """
    present_s, proposed_s = fmean(proposal.present_s), fmean(proposal.proposed_s)
    noted = Replan(
        step=step,
        present=str(present),
        proposed=str(proposal.plan),
        num_steps=proposal.num_steps,
        present_step_s=present_s,
        proposed_step_s=proposed_s,
        gain_s=proposal.num_steps * (present_s - proposed_s),
        cost_s=0.0,
        switched=True,
        decided_at=time.time(),
        reason=reason,
    )
    _write_replans(run, [*read_replans(run), noted])
    return noted


def process_age_s() -> float:
    """Return how long this process has been there (Linux)."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
    started_s = int(fields.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text(encoding="ascii").split()[0]) - started_s


def replanning_problems(
    request: TrainRequest,
    batching: Batching | None,
    admission: Admission,
    tasks: Sequence[TaskConfig],
) -> list[str]:
    """Return why a run with these tasks cannot be planned anew (empty: it can)."""
    problems = []
    if batching == "bucketed":
        problems.append("micro-batches are bucketed, but only packed steps are planned anew")
    if admission.memory is None:
        own = own_memory_path(request.model, 1, request.base_precision)
        problems.append(no_memory_profile(request.model, 1, own, request.base_precision))
    problems += [
        f"task {task.name}: adapter: full, and moments in 8 bits, go on on the same plan only"
        for task in tasks
        if task.trains_model or task.optimizer == ADAMW_8BIT
    ]
    return [f"--replan auto: {problem}" for problem in problems]


def planning_job(run: RunSpec, tasks: Sequence[RunTask], step: int) -> PlanningJob:
    """Return what is to be planned for after ``step`` steps of a run.

    Raises
    ------
    ConfigError
        If no task has steps left, or it is not known what fits beside the tasks' adapters.
    """
    assert run.replanning is not None and run.admission is not None
    if run.admission.memory is None:
        raise ConfigError("there is no memory profile")
    if not (going_on := [task for task in tasks if task.progress.steps_left]):
        raise ConfigError("no task has steps left")
    configs = [task.config for task in tasks]
    shape = base_shape(run)
    held_out = {name: held_out_data(run, name) for name in (t.config.name for t in going_on)}
    workload = Workload(
        lengths={task.config.name: task.data.example_lengths for task in going_on},
        batch_sizes={task.config.name: task.config.global_batch_size for task in going_on},
        clipped={},
        held_out={n: data.example_lengths for n, data in held_out.items() if data is not None},
        seeds={task.config.name: task.config.seed for task in going_on},
        num_steps={task.config.name: task.progress.num_steps for task in going_on},
        seed=run.seed,
        begun={task.config.name: task.progress.steps for task in going_on},
    )
    memory, _ = fitted_to(run.admission.memory, configs, shape)
    left = max(task.progress.steps_left for task in going_on)
    return PlanningJob(
        plan=run.plan,
        workload=workload,
        num_steps=min(left, run.last_step - step),
        memory=memory,
        cost_model=run.cost_model,
        shape=shape,
        model=run.replanning.model,
        num_gpus=run.replanning.num_gpus,
        gpus_per_node=run.replanning.gpus_per_node,
    )


class Replanner:
    """Plans anew whenever other tasks take part in steps than before, while the run goes on."""

    def __init__(self, run: RunSpec) -> None:
        """Take the plan for that of the tasks which take part first."""
        self._folder = run.output_dir
        self._planned_for: tuple[int, ...] | None = None
        self._process: PlanningProcess | None = None
        self._start_s = 0.0

    def note_start(self) -> None:
        """Note that the first step follows: how long the run took to come there."""
        self._start_s = process_age_s()
        replans = read_replans(self._folder)
        if replans and replans[-1].switched and replans[-1].pause_s is None:
            pause_s = time.time() - replans[-1].decided_at
            _write_replans(self._folder, [*replans[:-1], replace(replans[-1], pause_s=pause_s)])

    def look(
        self, run: RunSpec, tasks: Sequence[RunTask], attending: tuple[int, ...], step: int
    ) -> Proposal | None:
        """Return a proposal for the tasks that attend the next step, when there is one."""
        before, self._planned_for = self._planned_for, attending
        try:
            if before not in (None, attending):
                self.end()
                job = planning_job(run, tasks, step)
                self._process = PlanningProcess(partial(propose, job))
            proposal = None if self._process is None else self._process.result()
        except ConfigError as error:
            log.warning("the plan stays as it is: %s", error)
            self.end()
            return None
        if proposal is not None:
            self.end()
        return proposal

    def decide(
        self, run: RunSpec, proposal: Proposal, step: int, pace: float, save_s: float
    ) -> Replan:
        """Return, and note, whether switching to a proposed plan pays.

        Parameters
        ----------
        run
            The run, on its present plan.
        proposal
            The plan beside it.
        step
            The steps made.
        pace
            What steps took over what they were predicted to.
        save_s
            What the last checkpoint took.
        """
        replans = read_replans(self._folder)
        pauses = [one.pause_s for one in replans if one.pause_s is not None]
        cost_s = pauses[-1] if pauses else self._start_s + save_s
        # Of so many first ones of the priced steps, each of which stands for a part of those left.
        num_priced = len(proposal.present_s)
        part = min(proposal.num_steps, run.last_step - step) / num_priced
        present_s, proposed_s = (
            pace * part * np.cumsum(times_s)
            for times_s in (proposal.present_s, proposal.proposed_s)
        )
        costs_s = np.full(num_priced, 2 * cost_s)
        costs_s[-1] = cost_s
        best = int(np.argmax(present_s - proposed_s - costs_s))
        num_steps = max(1, round((best + 1) * part))
        gain_s, cost_s = float(present_s[best] - proposed_s[best]), float(costs_s[best])
        is_same = proposal.plan.groups == run.plan.groups
        decided = Replan(
            step=step,
            present=str(run.plan),
            proposed=str(proposal.plan),
            num_steps=num_steps,
            present_step_s=float(present_s[best]) / num_steps,
            proposed_step_s=float(proposed_s[best]) / num_steps,
            gain_s=gain_s,
            cost_s=cost_s,
            switched=gain_s > cost_s and not is_same,
            decided_at=time.time(),
        )
        _write_replans(self._folder, [*replans, decided])
        return decided

    def end(self) -> None:
        """Plan no more, until tasks change again."""
        if self._process is not None:
            self._process.end()
            self._process = None
