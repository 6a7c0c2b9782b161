"""Everything a rank needs to know about a run, resolved and checked beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.topology import Grid
from planner.plan import Plan
from profiler.cost_model import CostModel
from tasks.config import TaskConfig

CONFIG_FILE = "config.yaml"
DATA_FOLDER = "data"
ADAPTER_FOLDER = "adapters"


@dataclass(frozen=True)
class RunSpec:
    """A run as every rank sees it.

    `num_steps[t]` is how many steps task t trains, `last_step` where the run ends;
    `grids[replica][stage][tp_index]` is a global rank; `buckets` are the fixed padded lengths
    when `dynamic_buckets` is off.
    """

    model_folder: Path
    base_model: str
    tasks: tuple[TaskConfig, ...]
    num_steps: tuple[int, ...]
    last_step: int
    plan: Plan
    grids: tuple[Grid, ...]
    cost_model: CostModel
    output_dir: Path
    precision: str
    device: str
    num_buckets: int
    dynamic_buckets: bool
    buckets: tuple[int, ...]
    dispatch_mode: Literal["balance", "group"]
    seed: int
    record_sequences: bool = False

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the plan."""
        return self.plan.num_gpus

    def data_folder(self, task: int) -> Path:
        """Return where the task's tokenised sequences lie."""
        return self.output_dir / DATA_FOLDER / self.tasks[task].name

    def adapter_folder(self, task: int) -> Path:
        """Return where the task's adapter is written."""
        return self.output_dir / ADAPTER_FOLDER / self.tasks[task].name
