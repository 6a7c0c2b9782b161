"""Everything a rank needs to know about a run, resolved and checked beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lobra.layout.placement import placed
from lobra.layout.plan import Plan
from lobra.layout.sequences import Batching
from lobra.layout.world import World
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile
from lobra.tasks.config import TaskConfig

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"  # held as long as the run goes on
DATA_FOLDER = "tokenised/training"
VALIDATION_FOLDER = "tokenised/validation"
ADAPTER_FOLDER = "adapters"
PLAN_FOLDER = "plans"  # that the run was to go on on, by the step from which on
DEFAULT_PERIOD = 10  # steps between evaluations, where a task asks for them


@dataclass(frozen=True)
class Admission:
    """What tasks that join a run are checked against, beside its model and plan.

    Attributes
    ----------
    plan
        The plan as it was made: its micro-batches are never larger, whatever else fits.
    data_dir
        Where data sets lie.
    memory
        Which micro-batches fit beside which adapters; None where that is not known.
    confine
        The folder that paths of tasks must lie in; None: anywhere.
    max_seq_length
        What every task's context_length is cut to, if it is.
    validate_every
        Steps of an evaluation period, from when a task asks for one.
    task_file
        The task file that is watched, if one is.
    """

    plan: Plan
    data_dir: Path
    memory: MemoryProfile | None = None
    confine: Path | None = None
    max_seq_length: int | None = None
    validate_every: int = DEFAULT_PERIOD
    task_file: Path | None = None


@dataclass(frozen=True)
class Replanning:
    """How a run may be planned anew.

    Attributes
    ----------
    model
        What plans call the base model.
    num_gpus, gpus_per_node
        What there is to plan for.
    """

    model: str
    num_gpus: int
    gpus_per_node: int


@dataclass(frozen=True)
class RunSpec:
    """A run as every rank sees it.

    Attributes
    ----------
    model_folder, base_model, fingerprint
        The base model: its folder, what adapters call it, what checkpoints know it by.
    task_records
        What checkpoints know the tasks by.
    tasks, num_steps
        The tasks, each known by its place here as its number, and how many own steps each makes.
    last_step
        The step of the run with which it ends, whatever steps its tasks have left.
    max_steps
        The step with which it ends at the latest, also if tasks join it; None: with its tasks.
    plan, world
        The plan, and the plan on its ranks.
    cost_model
        What dispatching balances.
    output_dir
        The run's folder.
    precision
        A key of `model.precision.DTYPES`.
    device
        "cuda" or "cpu".
    num_buckets, dynamic_buckets, buckets
        Bucketed, how many padded lengths there are, whether chosen for every step; if not, which
        they are.
    dispatch_mode
        Bucketed, which replicas a sequence may go to.
    seed
        Of the run; every task's own seed is beside it.
    batching
        How micro-batches hold sequences.
    feedback
        Whether measured replica times correct the dispatcher.
    validate_every
        Steps of an evaluation period; 0: none.
    save_every
        Steps between checkpoints; 0: at the end only; None: by the clock.
    keep_checkpoints
        Checkpoints that are kept, the last ones.
    resume_step
        The checkpoint to go on from, None for a new run.
    revive
        Names of stopped tasks that are to go on.
    data_day
        The date (ISO) that chat templates with a date were told.
    plan_from
        The step (0-based) from which on the run has had this plan.
    report_to
        Trackers that are given the run's curves, keys of `trainer.trackers.TRACKERS`.
    profiled_steps
        Steps, counted from 1, of which torch's profiler writes traces.
    hang_timeout_s
        How long ranks may stand still; None: what `model.watch` finds long.
    deterministic
        Whether torch uses algorithms only that give the same bits every time.
    base_precision
        What the base's linears are kept in, one of `base_precision.QUANTISED`; None: not quantised.
    admission
        What tasks that join the run are checked against; None: none may.
    replanning
        How it is planned anew when its tasks change; None: it is not.
    """

    model_folder: Path
    base_model: str
    fingerprint: str
    task_records: tuple[dict[str, Any], ...]
    tasks: tuple[TaskConfig, ...]
    num_steps: tuple[int, ...]
    last_step: int
    plan: Plan
    world: World
    cost_model: CostModel
    output_dir: Path
    precision: str
    device: str
    num_buckets: int
    dynamic_buckets: bool
    buckets: tuple[int, ...]
    dispatch_mode: Literal["balance", "group"]
    seed: int
    batching: Batching = "packed"
    feedback: bool = False
    validate_every: int = 0
    save_every: int | None = None
    keep_checkpoints: int = 3
    resume_step: int | None = None
    revive: tuple[str, ...] = ()
    data_day: str | None = None
    plan_from: int = 0
    report_to: tuple[str, ...] = ()
    profiled_steps: frozenset[int] = frozenset()
    hang_timeout_s: float | None = None
    deterministic: bool = False
    base_precision: str | None = None
    max_steps: int | None = None
    admission: Admission | None = None
    replanning: Replanning | None = None

    @property
    def world_size(self) -> int:
        """The number of ranks of the plan."""
        return self.plan.num_gpus

    @property
    def trains_model(self) -> bool:
        """Whether the run's only task trains the model itself, and no adapter."""
        return any(task.trains_model for task in self.tasks)

    @property
    def made_plan(self) -> Plan:
        """The plan as it was made; beside the tasks of now its micro-batches may be smaller."""
        return self.plan if self.admission is None else self.admission.plan

    def on_plan(self, plan: Plan) -> RunSpec:
        """Return the run on another plan, whose file names its ranks."""
        world = placed(plan)
        assert world is not None and self.admission is not None
        return replace(self, plan=plan, world=world, admission=replace(self.admission, plan=plan))

    def on_gpus(self, num_gpus: int, gpus_per_node: int) -> RunSpec:
        """Return the run as it is planned anew where it may use no more GPUs than these."""
        assert self.replanning is not None
        most = min(num_gpus, self.replanning.num_gpus)
        return replace(self, replanning=Replanning(self.replanning.model, most, gpus_per_node))

    def data_folder(self, task: int | str) -> Path:
        """Return where a task's tokenised sequences lie; it is known by number or name."""
        return self.output_dir / DATA_FOLDER / self._name(task)

    def validation_folder(self, task: int | str) -> Path:
        """Return where a task's held-out sequences lie, if it has any."""
        return self.output_dir / VALIDATION_FOLDER / self._name(task)

    def adapter_folder(self, task: int | str) -> Path:
        """Return where a task's adapter is written."""
        return self.output_dir / ADAPTER_FOLDER / self._name(task)

    def _name(self, task: int | str) -> str:
        return task if isinstance(task, str) else self.tasks[task].name
