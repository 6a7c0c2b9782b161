"""Everything a rank needs to know about a run, resolved and checked beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lobra.layout.plan import Plan
from lobra.layout.world import World
from lobra.profiler.cost_model import CostModel
from lobra.tasks.config import TaskConfig

CONFIG_FILE = "config.yaml"
DATA_FOLDER = "tokenised/training"
VALIDATION_FOLDER = "tokenised/validation"
ADAPTER_FOLDER = "adapters"


@dataclass(frozen=True)
class RunSpec:
    """A run as every rank sees it.

    `fingerprint` and `task_records` identify the base model and the tasks in checkpoints;
    `num_steps[t]` is how many own steps task t makes, `last_step` where the run ends;
    `world` is the plan on its ranks; `buckets` are the fixed padded lengths when
    `dynamic_buckets` is off (else none). `feedback`: measured replica times correct the dispatcher.
    `precision` is a key of `model.precision.DTYPES`.
    `data_day` is the date (ISO) that chat templates with a date were told.
    `revive`: names of stopped tasks that are to go on.
    `plan_from`: the step (0-based) from which on the run has had this plan.
    `validate_every` and `save_every`: steps between evaluation periods and checkpoints (0: none).
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
    feedback: bool = False
    validate_every: int = 0
    save_every: int = 0
    keep_last: int = 3
    resume_step: int | None = None
    revive: tuple[str, ...] = ()
    data_day: str | None = None
    plan_from: int = 0

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the plan."""
        return self.plan.num_gpus

    def data_folder(self, task: int) -> Path:
        """Return where the task's tokenised sequences lie."""
        return self.output_dir / DATA_FOLDER / self.tasks[task].name

    def validation_folder(self, task: int) -> Path:
        """Return where the task's held-out sequences lie, if it has any."""
        return self.output_dir / VALIDATION_FOLDER / self.tasks[task].name

    def adapter_folder(self, task: int) -> Path:
        """Return where the task's adapter is written."""
        return self.output_dir / ADAPTER_FOLDER / self.tasks[task].name
