"""What planning and simulating need: their options in common, and what these name, read."""

# No postponed annotations here: subclasses in other modules could not resolve them.

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.status import Status

from lobra.common.errors import ConfigError, Problems
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
from lobra.layout.base_precision import BasePrecision
from lobra.layout.shapes import ModelShape, layout_problem, resolve_shape
from lobra.model.adapter_checks import task_file_problems
from lobra.planner.outcome import Progress
from lobra.planner.workload import Workload, read_workload
from lobra.profiler import lookup
from lobra.profiler.capacity import memory_profile_for
from lobra.profiler.cost_model import CostModel, Kind, load_cost_model
from lobra.profiler.profiles import MemoryProfile, adapter_elements_of
from lobra.tasks.config import TaskConfig
from lobra.tasks.lengths import PUBLISHED_LENGTHS
from lobra.tasks.sources import PUBLISHED, resolve_dataset
from lobra.tasks.task_file import TrainerConfig, load_trainer_config

LINE_EVERY_S = 5.0  # of progress, where a search is longer


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
        JSON or folder of .npy with sequence lengths, instead of data sets; "published": synthetic
        ones like those of LobRA's data sets.
    cost_model
        Which fit of the time profile.
    gpus_per_node
        GPUs of one node.
    """

    model: ModelName
    trainer_config: TaskSetName
    strategy_config: PlanName
    base_precision: BasePrecision | None = None
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

    @property
    def shape(self) -> ModelShape:
        """The base as it is to be kept; ConfigError if the model is unknown or not to be had so."""
        return resolve_shape(self.model).kept_in(self.base_precision)

    def layout_problem(self, tp: int, pp: int) -> str | None:
        """Return why the model cannot run under a layout, or None."""
        return layout_problem(self.shape, tp, pp)


@dataclass(frozen=True, eq=False)
class PlanningInputs:
    """What a plan is made of.

    Attributes
    ----------
    tasks
        The tasks.
    workload
        The tasks' lengths and global batches.
    cost_model
        What training these tasks costs.
    memory
        What fits beside their adapters; None where it was not asked for.
    notes
        What a person should know of all that, one sentence each.
    """

    tasks: tuple[TaskConfig, ...]
    workload: Workload
    cost_model: CostModel
    memory: MemoryProfile | None
    notes: tuple[str, ...]


def progress_on(console: Console, status: Status) -> Progress:
    """Return what shows a search's progress: in the status, or as lines where none can be drawn."""
    last_s = time.monotonic()

    def tell(message: str) -> None:
        nonlocal last_s
        status.update(f"planning: {message}")
        if not console.is_terminal and time.monotonic() - last_s > LINE_EVERY_S:
            last_s = time.monotonic()
            console.print(f"planning: {message}", soft_wrap=True)

    return tell


def read_tasks(
    options: PlanningOptions, problems: Problems
) -> tuple[TrainerConfig | None, ModelShape | None]:
    """Return the task file and the base as it is to be kept, None what is not usable.

    ``problems`` gets why, and what the model cannot have of the tasks' adapters.
    """
    config = problems.result_of(load_trainer_config, options.trainer_config, options.num_tasks)
    shape = None
    with problems.noted():
        shape = options.shape
    if config is not None and shape is not None:
        problems += task_file_problems(config, shape)
    return config, shape


def read_inputs(
    options: PlanningOptions, problems: Problems, with_memory: bool = True
) -> PlanningInputs:
    """Return the tasks' workload and what training them costs.

    Raises
    ------
    ConfigError
        If a file is missing or has mistakes, the model cannot have an adapter of the tasks, or
        there are other ``problems``: all at once.
    """
    times = capacities = cost_model = memory = found = None
    notes: list[str | None] = []
    config, shape = read_tasks(options, problems)
    with problems.noted():
        if shape is None:  # nothing is looked for by the name of a model that is none
            times, capacities = options.time_profile, options.memory_profile
        elif with_memory and config is not None:
            times, capacities = lookup.planning_paths(
                options.model, len(config.tasks), options.time_profile, options.memory_profile,
                options.base_precision,
            )  # fmt: skip
        else:
            own_times = lookup.time_path(options.model, options.base_precision)
            times = options.time_profile or own_times
    with problems.noted():
        if times is not None:
            cost_model = load_cost_model(options.model, times, options.cost_model)
            problems += _of_another_base(times, options.shape)
    with problems.noted():
        if config is not None and capacities is not None:
            memory, of_memory = memory_profile_for(options.model, config.tasks, capacities)
            notes += of_memory
            problems += _of_another_base(capacities, options.shape)
    if config is not None:
        lengths, note = lengths_for(config, options)
        notes.append(note)
        try:
            found = read_workload(
                config, options.model, lengths, options.data_dir, options.max_seq_length,
                options.seed,
            )  # fmt: skip
        except ConfigError as error:
            problems += error.problems.changed(_or_lengths).beyond(problems)
    problems.raise_if_any()
    assert config and cost_model and found
    origins = [lookup.provenance_note(path) for path in (times, capacities) if path is not None]
    notes.append(next(filter(None, origins), None))  # the same is said once
    workload, shares = found
    adapters = [(task.largest_rank, task.target_modules) for task in config.tasks]
    elements = adapter_elements_of(options.model, adapters)
    cost_model = cost_model.for_training(shares, elements)
    return PlanningInputs(config.tasks, workload, cost_model, memory, tuple(filter(None, notes)))


def _of_another_base(path: Path, shape: ModelShape) -> list[str]:
    """Return why a profile is not of the base as it is to be kept."""
    problem = lookup.base_precision_problem(path, shape.quantised)
    return [f"{problem}; --base-precision says what the base is kept in"] if problem else []


def _or_lengths(problem: str) -> str:
    """Return the problem, with what planning needs in place of data where they are missing."""
    hint = "; planning needs lengths only: --lengths FILE, or --lengths published for LobRA's sets"
    return problem + hint if "no such data set" in problem else problem


def lengths_for(config: TrainerConfig, options: PlanningOptions) -> tuple[Path | None, str | None]:
    """Return the lengths to take, None for those of the data sets, and a note if they are made up.

    Without ``--lengths``, and without any of the data sets where all of them are LobRA's, they are
    those that have the moments it published.
    """
    lengths = options.lengths
    names = dict.fromkeys(name for task in config.tasks for name in task.dataset_names)
    if lengths is None and not any(_is_at_hand(name, options.data_dir) for name in names):
        lengths = PUBLISHED_LENGTHS
        missing = f"{options.data_dir}/ has none of {', '.join(names)}: "
    elif lengths == PUBLISHED_LENGTHS:
        missing = ""
    else:
        return lengths, None
    note = (
        f"{missing}lengths are SYNTHETIC, with the mean, skewness and kurtosis that LobRA "
        f"published; your data will differ (scripts/create_finetune_datasets.sh fetches LobRA's, "
        f"--lengths FILE takes yours)"
    )
    return lengths, note


def _is_at_hand(name: str, data_dir: Path) -> bool:
    """Return whether there is a data set of that name, or one must be: only LobRA's may miss."""
    if name not in PUBLISHED:
        return True
    try:
        resolve_dataset(name, data_dir)
    except ConfigError:
        return False
    return True
