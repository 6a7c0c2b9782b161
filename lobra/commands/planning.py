"""What planning and simulating need: their options in common, and what these name, read."""

# No postponed annotations here: subclasses in other modules could not resolve them.

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lobra.common.errors import Problems
from lobra.common.options import (
    DataDir,
    Json,
    ModelName,
    NumBuckets,
    NumTasks,
    NumTokens,
    PlanName,
    PositiveInt,
    Seed,
    TaskSetName,
    TimeProfile,
)
from lobra.planner.workload import Workload, read_workload
from lobra.profiler.cost_model import CostModel, Kind, load_cost_model
from lobra.profiler.profiles import adapter_elements_of, layout_problem_of
from lobra.tasks.config import TrainerConfig, load_trainer_config


@dataclass(frozen=True, kw_only=True)
class PlanningOptions:
    """Options of `lobra plan` and `lobra simulate`.

    Parameters
    ----------
    max_seq_length
        Tokens; longer sequences are cut.
    memory_profile
        CSV tp,pp,sp,max_tokens; by default the model's for so many tasks.
    lengths
        JSON or folder of .npy with sequence lengths, instead of data sets.
    cost_model
        Which fit of the time profile.
    gpus_per_node
        GPUs of one node.
    """

    model: ModelName
    trainer_config: TaskSetName
    strategy_config: PlanName
    num_tasks: NumTasks = None
    num_buckets: NumBuckets = 16
    max_seq_length: NumTokens = 16384
    time_profile: TimeProfile = None
    memory_profile: Annotated[Path | None, Parameter(metavar="CSV")] = None
    lengths: Path | None = None
    data_dir: DataDir = Path("data")
    cost_model: Kind = "fitted"
    gpus_per_node: PositiveInt = 8
    seed: Seed = 0
    json: Json = False

    def layout_problem(self, tp: int, pp: int) -> str | None:
        """Return why the model cannot run under a layout, or None."""
        return layout_problem_of(self.model, tp, pp)


def read_inputs(
    options: PlanningOptions, problems: Problems
) -> tuple[TrainerConfig, Workload, CostModel]:
    """Return the tasks, their workload, and the cost model of training them.

    Raises
    ------
    ConfigError
        If a file is missing or has mistakes, or there are other ``problems``: all at once.
    """
    config = cost_model = None
    with problems.noted():
        config = load_trainer_config(options.trainer_config, options.num_tasks)
    with problems.noted():
        cost_model = load_cost_model(options.model, options.time_profile, options.cost_model)
    problems.raise_if_any()
    assert config and cost_model
    workload, labels = read_workload(
        config, options.model, options.lengths, options.data_dir, options.max_seq_length,
        options.seed,
    )  # fmt: skip
    adapters = [(task.rank, task.target_modules) for task in config.tasks]
    elements = adapter_elements_of(options.model, adapters)
    return config, workload, cost_model.for_training(labels, elements)
