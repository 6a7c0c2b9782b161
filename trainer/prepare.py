"""From what the user asked for to a checked `RunSpec`: everything is refused before it is started.

All mistakes are collected and reported at once; nothing is written until there are none.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError, Problems
from lobra.common.options import within_bounds
from lobra.common.words import counted
from lobra.layout.base_precision import library_problem, option_problem, plan_problem, takes_more
from lobra.layout.placement import place, placed
from lobra.layout.plan import Plan, load_plan
from lobra.layout.sequences import Batching
from lobra.layout.shapes import ModelShape, layout_problem, read_shape
from lobra.layout.world import World
from lobra.model.checkpoint import checkpoint_problems
from lobra.model.fingerprint import MARK, fingerprint
from lobra.model.folder import resolve_folder
from lobra.planner.workload import token_shares
from lobra.profiler.cost_model import CostModel, load_cost_model
from lobra.profiler.estimate_memory import layer_weights
from lobra.profiler.hardware import product_problem
from lobra.profiler.lookup import (
    base_precision_problem,
    no_memory_profile,
    no_time_profile,
    own_memory_path,
    provenance_note,
    time_path,
)
from lobra.tasks.config import (
    ADAMW_8BIT,
    FULL,
    TaskConfig,
    TrainerConfig,
    clip_context,
    load_trainer_config,
)
from lobra.tasks.data_report import summary_text
from lobra.tasks.dataset import TokenizedDataset, split
from lobra.tasks.sampling import num_steps
from lobra.tasks.text_processor import TextProcessor
from lobra.trainer.admission import admission_of
from lobra.trainer.batching import chosen_batching, fixed_buckets
from lobra.trainer.checkpoint import CheckpointState, read_state
from lobra.trainer.eight_bit import eight_bit_problems
from lobra.trainer.live_tasks import fitting_plan, present_tasks
from lobra.trainer.log_parts import METRICS_FILE
from lobra.trainer.metrics import kept_metrics
from lobra.trainer.model_checks import check_memory, model_problems
from lobra.trainer.request import TrainRequest
from lobra.trainer.resume_checks import resume_problems, revival_problems, task_record
from lobra.trainer.run_config import (
    PlanPeriod,
    plan_history,
    resolved_config,
    warn_of_other_versions,
)
from lobra.trainer.run_folder import occupied, unusable, write_run_folder
from lobra.trainer.run_spec import DEFAULT_PERIOD, Admission, Replanning, RunSpec
from lobra.trainer.step_trace import steps_of
from lobra.trainer.task_data import TaskChecks, tasks_with_data, warn_of_greedy_tasks
from lobra.trainer.trackers import trackers_of

log = logging.getLogger(__name__)

RANK_BYTES = 64 << 20  # of its own, the least that a rank's process takes on a CPU
ONE_MACHINE = 1 << 30  # a CPU machine is one node, however many ranks it runs


class _Collector:
    """Runs checks and keeps every problem."""

    def __init__(self, problems: Iterable[str] = ()) -> None:
        self.problems = Problems(problems)

    def attempt(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return function(...), or None after noting the ConfigError it raised."""
        with self.problems.noted():
            return function(*args, **kwargs)
        return None

    def raise_if_any(self) -> None:
        self.problems.raise_if_any()


def prepare(request: TrainRequest) -> RunSpec:
    """Check the request, tokenise the data into the run's folder and return the RunSpec.

    Raises
    ------
    ConfigError
        With every mistake found; nothing was written then.
    """
    request, problems = within_bounds(request)
    checks = _Collector([*problems, *request.mistakes])
    left_out = Problems() if request.skip_bad_tasks else checks.problems
    config: TrainerConfig | None = checks.attempt(
        load_trainer_config,
        request.trainer_config,
        request.num_tasks,
        left_out if request.skip_bad_tasks else None,
        whole_models=True,
    )
    plan: Plan | None = checks.attempt(requested_plan, request)
    folder: Path | None = checks.attempt(resolve_folder, request.model)
    shape: ModelShape | None = checks.attempt(_base_shape, folder, request) if folder else None
    unusable_base = Problems()
    if folder is not None and shape is not None:
        unusable_base = checkpoint_problems(folder, shape)
        checks.problems += unusable_base
    state: CheckpointState | None = None
    if request.confine is not None and not os.path.isdir(request.confine):
        checks.problems.add(f"--confine {request.confine}: no such folder")
    inputs = [request.data_dir, *([folder] if folder else [])]
    blocked = unusable(request.output_dir, inputs)
    if not request.is_resumed:
        blocked = blocked or occupied(request.output_dir)
    checks.problems += blocked
    if request.is_resumed and not blocked:
        state = checks.attempt(read_state, request.output_dir, request.resume_step)
        if state is not None:
            checks.problems += revival_problems(state, request.revive)
            _warn_of_the_log(request.output_dir, state)
    if request.revive and not request.is_resumed:
        checks.problems.add("--revive: only a run that goes on (--resume) has stopped tasks")
    if plan is not None and request.num_gpus is not None and plan.num_gpus > request.num_gpus:
        checks.problems.add(
            f"{request.strategy_config}: the plan {plan} needs {plan.num_gpus} ranks, but only "
            f"{counted(request.num_gpus, 'GPU')} may be used; plan for that number"
        )
    launched = request.launched_world
    if plan is not None and launched is not None and plan.num_gpus != launched:
        checks.problems.add(
            f"{request.strategy_config}: the plan {plan} has {plan.num_gpus} ranks, the launcher "
            f"started {launched}; start one process per rank"
        )
    trains_model = config is not None and any(task.adapter == FULL for task in config.tasks)
    if request.memory_budget is not None and not trains_model:
        checks.problems.add(
            f"--memory-budget {request.memory_budget}: only a task with adapter: full is held to "
            f"it; what adapters take is in the plan's max_tokens"
        )
    if request.deterministic and request.feedback == "on":
        checks.problems.add(
            "--deterministic and --feedback on: timings would decide which micro-batch a sequence "
            "is in; leave one out"
        )
    if request.watch_tasks and request.num_tasks is not None:
        checks.problems.add(
            "--watch-tasks and --num-tasks: all tasks of the file would join; leave one out"
        )
    report_to: tuple[str, ...] = checks.attempt(trackers_of, request.report_to) or ()
    profiled_steps: frozenset[int] = frozenset()
    if request.torch_profiler is not None:
        profiled_steps = checks.attempt(steps_of, request.torch_profiler) or frozenset()
    device = checks.attempt(_choose_device, request, plan)
    precision = request.precision or ("bf16" if device == "cuda" else "fp32")
    quantised = None if shape is None else shape.quantised
    checks.problems += filter(
        None,
        (
            option_problem(request.base_precision, precision),
            library_problem(quantised),
            product_problem(quantised, device),
        ),
    )
    batching = checks.attempt(
        chosen_batching, request.batching, request.dp_bucket, request.dispatch, plan
    )
    world: World | None = None
    if plan is not None and device is not None:
        world = checks.attempt(place_plan, plan, request, device)
    if shape is not None and plan is not None:
        checks.problems += [
            f"{request.strategy_config}: {problem} ({request.model})"
            for layout in {group.layout for group in plan.groups}
            if (problem := layout_problem(shape, layout.tp, layout.pp))
        ]
        checks.problems += _room_problems(plan, shape, request)
    if config is not None and shape is not None and plan is not None:
        checks.problems += model_problems(config.tasks, plan, shape)
    cost_model = None
    known = request.time_profile is not None or folder is not None
    without_profile = _missing_profile(request) if known else []
    checks.problems += without_profile
    if shape is not None and plan is not None and not without_profile:
        cost_model = checks.attempt(dispatch_costs, request, plan, shape.quantised)
    tasks: tuple[TaskConfig, ...] = ()
    datasets: tuple[TokenizedDataset, ...] = ()
    buckets: tuple[int, ...] = ()
    if blocked or (request.is_resumed and state is None):  # before tokenising for nothing
        checks.raise_if_any()
    if config is not None and folder is not None:
        model_folder = folder
        processor = TextProcessor.of_folder(lambda: model_folder, _first_day(state))
        task_checks = TaskChecks(
            processor,
            request.data_dir,
            shape,
            plan,
            batching,
            request.confine,
            not request.is_resumed,
        )
        kept: list[tuple[TaskConfig, TokenizedDataset]] = []
        num_wanted = 0
        for part in checks.attempt(present_tasks, config, state, request.watch_tasks) or ():
            clipped = clip_context(part.tasks, request.max_seq_length)
            kept += tasks_with_data(part, clipped, task_checks, left_out)
            num_wanted += len(clipped)
        if kept and (request.skip_bad_tasks or len(kept) == num_wanted):
            tasks, datasets = zip(*kept, strict=True)
            if plan is not None and batching == "bucketed" and request.dp_bucket == "off":
                buckets = checks.attempt(fixed_buckets, request.num_buckets, datasets, plan) or ()
        elif request.skip_bad_tasks:
            checks.problems += left_out
    training: list[TokenizedDataset] = []
    if datasets:
        parts = [
            split(task, data, request.seed) for task, data in zip(tasks, datasets, strict=True)
        ]
        training = [part[0] for part in parts]
        validation = [part[1] for part in parts]
        pairs = list(zip(tasks, training, strict=True))
        records = [task_record(task, data) for task, data in pairs]
        steps = {task.name: num_steps(task, data.num_examples) for task, data in pairs}
        end = last_step(state, request.revive, steps, request.max_steps)
        if max(profiled_steps, default=0) > end:
            checks.problems.add(
                f"--torch-profiler {request.torch_profiler}: the run ends with step {end}"
            )
    if state is not None and training and folder is not None:
        base = state.base_model
        if shape is not None and not unusable_base:
            base = checks.attempt(fingerprint, folder, shape, like=state.base_model) or base
            _warn_of_old_fingerprint(state)
        checks.problems += resume_problems(
            state,
            records,
            request.seed,
            base,
            request.trainer_config,
            None if shape is None else shape.quantised,
        )
        checks.problems += revivals_in_vain(state, request.revive, steps)
    if plan is not None and device is not None:
        checks.problems += eight_bit_problems(
            tasks, precision, str(plan), None if state is None else state.plan
        )
    admission = admission_of(request, config, plan) if config and plan else None
    replanning = None
    if request.replan == "auto" and plan and device and batching and admission:
        replanning = checks.attempt(_replanning, request, plan, device, batching, admission, tasks)
    checks.raise_if_any()
    assert config and plan and folder and shape and world and cost_model and device and batching
    cost_model = cost_model.for_training(
        token_shares(tasks, training),
        sum(_trained_elements(task, shape) for task in tasks),
    )

    run = RunSpec(
        model_folder=folder,
        base_model=str(folder.resolve()),
        fingerprint=fingerprint(folder, shape),
        task_records=tuple(records),
        tasks=tasks,
        num_steps=tuple(steps.values()),
        last_step=end,
        max_steps=request.max_steps,
        plan=plan,
        world=world,
        cost_model=cost_model,
        output_dir=request.output_dir,
        precision=precision,
        device=device,
        num_buckets=request.num_buckets,
        dynamic_buckets=request.dp_bucket != "off",
        buckets=buckets,
        dispatch_mode=request.dispatch or "balance",
        seed=request.seed,
        batching=batching,
        feedback=_uses_feedback(request, device),
        validate_every=_evaluation_period(request, tasks),
        save_every=request.save_every,
        keep_checkpoints=request.keep_checkpoints,
        resume_step=None if state is None else state.step,
        revive=request.revive,
        data_day=processor.day.isoformat(),
        report_to=report_to,
        profiled_steps=profiled_steps,
        hang_timeout_s=request.hang_timeout,
        deterministic=request.deterministic,
        base_precision=shape.quantised,
        admission=admission,
        replanning=replanning,
    )
    if run.trains_model:
        check_memory(run, shape, request.memory_budget)
    if state is not None and state.changes:
        run = replace(run, plan=fitting_plan(run, run.tasks))
    if state is not None and state.precision not in (None, run.precision):
        log.warning(
            "the run goes on in %s, so far it was in %s: what the checkpoint holds is rounded to "
            "it, and the result is of neither precision (--precision %s keeps to it)",
            run.precision, state.precision, state.precision,
        )  # fmt: skip
    if state is not None and state.batching != run.batching:
        log.warning(
            "the run goes on with %s micro-batches, so far they were %s: what is computed is the "
            "same but for rounding",
            run.batching, state.batching,
        )  # fmt: skip
    if left_out:
        log.warning("left out (--skip-bad-tasks): %s", left_out)
    warn_of_greedy_tasks(tasks, training)
    if state is not None:
        warn_of_other_versions(run)
    log.info("the tasks' data:\n%s", summary_text(datasets))
    _warn_of_long_contexts(tasks, training, shape)
    plans = plan_history(run.output_dir, PlanPeriod.of(run))
    run = replace(run, plan_from=plans[-1].from_step)
    size = _common_node_size(request, device) if device == "cuda" else None
    write_run_folder(run, resolved_config(run, request, size, plans), training, validation)
    return run


def _trained_elements(task: TaskConfig, shape: ModelShape) -> int:
    """Return the parameters that a task's ranks exchange."""
    if task.adapter == FULL:
        return shape.num_layers * layer_weights(shape)
    return shape.adapter_elements(task.largest_rank, task.target_modules)


def _replanning(
    request: TrainRequest,
    plan: Plan,
    device: str,
    batching: Batching,
    admission: Admission,
    tasks: Sequence[TaskConfig],
) -> Replanning:
    """Return how the run may be planned anew; ConfigError if it cannot be."""
    problems = []
    if batching != "packed":
        problems.append("micro-batches are bucketed, but only packed steps are planned anew")
    if admission.memory is None:
        own = own_memory_path(request.model, 1, request.base_precision)
        problems.append(no_memory_profile(request.model, 1, own, request.base_precision))
    problems += [
        f"task {task.name}: adapter: full, and moments in 8 bits, go on on the same plan only"
        for task in tasks
        if task.adapter == FULL or task.optimizer == ADAMW_8BIT
    ]
    Problems(f"--replan auto: {problem}" for problem in problems).raise_if_any()
    num_gpus = request.num_gpus or plan.num_gpus
    return Replanning(request.model, num_gpus, _common_node_size(request, device))


def _warn_of_old_fingerprint(state: CheckpointState) -> None:
    """Warn where a checkpoint says too little about its base model to tell another one."""
    if not state.base_model.startswith(MARK):
        log.warning(
            "the checkpoint is of an older version, which knew the base model by the start of its "
            "files only: see to it that --model is the one it was trained on"
        )


def _warn_of_the_log(folder: Path, state: CheckpointState) -> None:
    """Warn where metrics.jsonl is damaged, or lacks steps that the run has made."""
    path = folder / METRICS_FILE
    kept = kept_metrics(folder, state.step, state.last_metrics)
    if kept.damage:
        log.warning("%s: will be set aside, what is whole of it kept: %s", path, kept.damage)
    if gone := kept.missing(state.step):
        log.warning(
            "%s: lacks %d of the steps so far, the first of them step %d; reports will not have "
            "them",
            path, len(gone), gone[0] + 1,
        )  # fmt: skip


def _first_day(state: CheckpointState | None) -> date | None:
    """Return the date of a run's data: that of its first day, None for today's."""
    return date.fromisoformat(state.data_day) if state and state.data_day else None


def _warn_of_long_contexts(
    tasks: Sequence[TaskConfig], datasets: Sequence[TokenizedDataset], shape: ModelShape
) -> None:
    """Warn of tasks whose sequences may be longer than what the model was made for."""
    for task, data in zip(tasks, datasets, strict=True):
        if shape.max_positions is not None and task.context_length > shape.max_positions:
            log.warning(
                "task %s: its context_length %d is beyond the model's max_position_embeddings %d "
                "(its longest sequence has %d tokens); what lies beyond may be learnt badly",
                task.name, task.context_length, shape.max_positions, int(data.lengths.max()),
            )  # fmt: skip


def revivals_in_vain(
    state: CheckpointState, revived: Sequence[str], num_steps: Mapping[str, int]
) -> list[str]:
    """Return a problem for every stopped task that would train nothing if it were revived.

    `num_steps` are the steps each task is to run now, by its name.
    """
    return [
        f"--revive {name}: its {num_steps[name]} steps are over; raise its steps"
        for name, progress in state.progress.items()
        if name in revived and progress.stopped is not None
        if name in num_steps and num_steps[name] <= progress.steps
    ]


def last_step(
    state: CheckpointState | None,
    revived: Sequence[str],
    num_steps: Mapping[str, int],
    max_steps: int | None,
) -> int:
    """Return the run's step by which every task has made its own steps; at most `max_steps`."""
    begun, left = 0, list(num_steps.values())
    if state is not None:
        begun = state.step
        left = [
            max(0, num_steps[name] - progress.steps)
            for name, progress in state.progress.items()
            if progress.stopped is None or name in revived
        ]
    end = begun + max(left, default=0)
    return end if max_steps is None else min(end, max_steps)


def node_sizes(request: TrainRequest, device: str | None) -> int | tuple[int, ...]:
    """Return how many of the plan's ranks every node holds, or each.

    As asked for, else as the launcher started them, else the GPUs of this machine.
    """
    import torch

    if request.gpus_per_node is not None:
        return request.gpus_per_node
    if request.found_nodes is not None:
        return request.found_nodes
    return torch.cuda.device_count() if device == "cuda" else ONE_MACHINE


def _common_node_size(request: TrainRequest, device: str) -> int:
    """Return how many ranks in a row are on one node, wherever they begin."""
    nodes = node_sizes(request, device)
    return math.gcd(*nodes) if isinstance(nodes, tuple) else nodes


def requested_plan(request: TrainRequest) -> Plan:
    """Return the plan, under the memory policy that was asked for.

    Raises
    ------
    ConfigError
        The plan's file is not usable, or there is no such policy.
    """
    plan = load_plan(request.strategy_config)
    return plan if request.memory is None else plan.with_memory(request.memory)


def place_plan(plan: Plan, request: TrainRequest, device: str | None) -> World:
    """Return the plan on the ranks its file says, else on those of this cluster's nodes.

    So too where the file's ranks spread tensor-parallel groups over nodes, which is warned of.

    Raises
    ------
    ConfigError
        The file's ranks do not fit the plan, or it cannot be placed.
    """
    nodes = node_sizes(request, device)
    try:
        world = placed(plan)
    except ConfigError as error:
        raise ConfigError(error.problems.prefixed(f"{request.strategy_config}: ")) from None
    if world is None:
        return place(plan, nodes)
    spread = world.spread_groups(nodes)
    if not spread:
        return world
    try:
        better, instead = place(plan, nodes), "the plan is placed anew"
    except ConfigError:
        better, instead = world, "which is slow; plan for them (--gpus-per-node)"
    log.warning(
        "%s: meta.ranks spreads the tensor-parallel group %s over nodes of %s GPUs: %s",
        request.strategy_config, list(spread[0]), nodes, instead,
    )  # fmt: skip
    return better


def _uses_feedback(request: TrainRequest, device: str) -> bool:
    """Return whether measured times decide who computes what: never where bits are to repeat."""
    if request.feedback is None:
        return device == "cuda" and not request.deterministic
    return request.feedback == "on"


def _evaluation_period(request: TrainRequest, tasks: Sequence[TaskConfig]) -> int:
    """Return the steps of an evaluation period, 0 when nothing is to be evaluated."""
    if request.validate_every is not None:
        return request.validate_every
    wanted = any(task.validation_split or task.early_stopping_patience for task in tasks)
    return DEFAULT_PERIOD if wanted else 0


def _choose_device(request: TrainRequest, plan: Plan | None) -> str:
    """Return "cuda" or "cpu"; refuse a plan that needs more GPUs than this machine has."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = request.device
    if device == "auto":
        device = "cuda" if found else "cpu"
    if device == "cuda" and not found:
        raise ConfigError("--device cuda: this machine has no CUDA device that torch can use")
    if (
        device == "cuda"
        and request.launched_world is None
        and plan is not None
        and plan.num_gpus > found
    ):
        raise ConfigError(
            f"{request.strategy_config}: the plan {plan} needs {counted(plan.num_gpus, 'GPU')}, "
            f"this machine has {found}: {plan.num_gpus - found} missing; give --host-file for "
            f"several machines, or --device cpu to run every rank as a CPU process"
        )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cpu" and request.launched_world is None and plan is not None:
        needed = plan.num_gpus * RANK_BYTES
        if needed > there:
            raise ConfigError(
                f"{request.strategy_config}: the plan {plan} needs {plan.num_gpus} ranks, which as "
                f"CPU processes take {needed / 2**30:.0f} GiB or more, this machine has "
                f"{there / 2**30:.0f}; plan for fewer"
            )
    return device


def _base_shape(folder: Path, request: TrainRequest) -> ModelShape:
    return read_shape(folder).kept_in(request.base_precision)


def _room_problems(plan: Plan, shape: ModelShape, request: TrainRequest) -> list[str]:
    """Return a problem for a plan of a base that leaves more room; warn of one that leaves less."""
    made_for = plan.meta.get("base_precision")
    if problem := plan_problem(made_for, shape.quantised):
        return [f"{request.strategy_config}: {problem}"]
    if plan.meta and takes_more(made_for, shape.quantised):
        log.warning(
            "%s: was made for a base that takes more memory than one in %s: plan again, and its "
            "micro-batches may be larger",
            request.strategy_config, shape.quantised,
        )  # fmt: skip
    return []


def _profile_path(request: TrainRequest) -> Path:
    return Path(request.time_profile or time_path(request.model, request.base_precision))


def _missing_profile(request: TrainRequest) -> list[str]:
    """Return a problem if there is no time profile."""
    path = _profile_path(request)
    if os.path.exists(path):
        return []
    return [no_time_profile(request.model, path, request.base_precision)]


def dispatch_costs(request: TrainRequest, plan: Plan, quantised: str | None = None) -> CostModel:
    """Return the cost model the dispatcher balances with, the base's linears being kept so.

    Raises
    ------
    ConfigError
        There is no time profile, or it lacks a tensor-parallel degree of the plan.
    """
    path = _profile_path(request)
    model = load_cost_model(request.model, path, request.cost_model)
    if origin := provenance_note(path):
        log.warning("replicas are balanced by %s", origin)
    if problem := base_precision_problem(path, quantised):
        log.warning("replicas are balanced, and steps predicted, by other times: %s", problem)
    wanted = sorted({group.layout for group in plan.groups})
    for memory in sorted({layout.memory for layout in wanted if layout.memory != "keep"}):
        unknown = sorted({one.tp for one in wanted if one.memory == memory and not model.has(one)})
        if unknown:
            sizes = ",".join(map(str, unknown))
            log.warning(
                "%s: has no times of tp %s with memory %s, which the plan asks for: replicas are "
                "balanced and predicted as if they kept all, steps take longer than predicted; "
                "measure them with lobra profile time --tp %s --memory %s",
                path, sizes, memory, sizes, memory,
            )  # fmt: skip
            model = model.taking_kept_times(memory)
    missing = dict.fromkeys(model.missing(layout) for layout in wanted if not model.has(layout))
    if missing:
        raise ConfigError(list(missing))
    return model
