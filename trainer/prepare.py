"""From what the user asked for to a checked `RunSpec`: everything is refused before it is started.

All mistakes are collected and reported at once; nothing is written until there are none.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from lobra.common.errors import Problems
from lobra.common.options import within_bounds
from lobra.model.fingerprint import fingerprint
from lobra.tasks.data_report import summary_text
from lobra.trainer.eight_bit import eight_bit_problems
from lobra.trainer.live_tasks import evaluation_period, fitting_plan, training_costs
from lobra.trainer.model_checks import check_memory
from lobra.trainer.plan_checks import common_node_size
from lobra.trainer.replanner import replanning_problems
from lobra.trainer.request import TrainRequest
from lobra.trainer.resume_checks import (
    resume_problems,
    revivals_in_vain,
    warn_of_old_fingerprint,
    warn_of_other_rounding,
)
from lobra.trainer.run_config import (
    PlanPeriod,
    plan_history,
    resolved_config,
    warn_of_other_versions,
)
from lobra.trainer.run_folder import write_run_folder
from lobra.trainer.run_inputs import RunInputs, read_inputs
from lobra.trainer.run_setting import RunSetting, chosen_setting
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.task_data import warn_of_greedy_tasks, warn_of_long_contexts
from lobra.trainer.trained_tasks import TrainedTasks, last_step, read_tasks

log = logging.getLogger(__name__)


def prepare(request: TrainRequest) -> RunSpec:
    """Check the request, tokenise the data into the run's folder and return the RunSpec.

    Raises
    ------
    ConfigError
        With every mistake found; nothing was written then.
    """
    request, problems = within_bounds(request)
    problems += [*request.mistakes, *request.contradictions]
    bad_tasks = Problems() if request.skip_bad_tasks else problems
    inputs = read_inputs(request, problems, bad_tasks)
    setting = chosen_setting(request, inputs, problems)
    if not inputs.may_start:  # before tokenising for nothing
        problems.raise_if_any()
    trained = read_tasks(request, inputs, setting.batching, problems, bad_tasks)
    problems += _task_problems(request, inputs, setting, trained)
    problems.raise_if_any()
    run, shape, state = _run_spec(request, inputs, setting, trained), inputs.shape, inputs.state
    assert shape is not None
    check_memory(run, shape, request.memory_budget)
    if bad_tasks:
        log.warning("left out (--skip-bad-tasks): %s", bad_tasks)
    warn_of_greedy_tasks(run.tasks, trained.training)
    warn_of_long_contexts(run.tasks, trained.training, shape)
    if state is not None:
        if state.changes:
            run = replace(run, plan=fitting_plan(run, run.tasks))
        warn_of_other_rounding(state, run)
        warn_of_other_versions(run)
    log.info("the tasks' data:\n%s", summary_text(trained.datasets))
    plans = plan_history(run.output_dir, PlanPeriod.of(run))
    run = replace(run, plan_from=plans[-1].from_step)
    node_size = common_node_size(request, run.device) if run.device == "cuda" else None
    config = resolved_config(run, request, node_size, plans)
    write_run_folder(run, config, trained.training, trained.validation)
    return run


def _task_problems(
    request: TrainRequest, inputs: RunInputs, setting: RunSetting, trained: TrainedTasks
) -> Problems:
    """Return why a run cannot train its tasks, read with their data, as was asked for."""
    problems = Problems()
    plan, state, shape = inputs.plan, inputs.state, inputs.shape
    end = last_step(state, request.revive, trained.num_steps, request.max_steps)
    if trained.tasks and max(setting.profiled_steps, default=0) > end:
        problems.add(f"--torch-profiler {request.torch_profiler}: the run ends with step {end}")
    if trained.tasks and state is not None and inputs.folder is not None:
        base = state.base_model
        if shape is not None and inputs.is_whole:
            base = problems.result_of(fingerprint, inputs.folder, shape, like=base) or base
            warn_of_old_fingerprint(state)
        problems += resume_problems(
            state,
            trained.records,
            request.seed,
            base,
            request.trainer_config,
            None if shape is None else shape.quantised,
        )
        problems += revivals_in_vain(state, request.revive, trained.num_steps)
    if plan is not None and setting.device is not None:
        earlier = None if state is None else state.plan
        problems += eight_bit_problems(trained.tasks, setting.precision, str(plan), earlier)
    if request.replan == "auto" and setting.admission is not None:
        problems += replanning_problems(request, setting.batching, setting.admission, trained.tasks)
    return problems


def _run_spec(
    request: TrainRequest, inputs: RunInputs, setting: RunSetting, trained: TrainedTasks
) -> RunSpec:
    """Return the run that all of this, without mistakes, is of."""
    plan, folder, shape, state = inputs.plan, inputs.folder, inputs.shape, inputs.state
    device, batching, admission = setting.device, setting.batching, setting.admission
    assert plan and folder and shape and device and batching and admission
    assert setting.world and setting.cost_model
    validate_every = request.validate_every
    if validate_every is None:
        validate_every = evaluation_period(trained.tasks, admission)
    return RunSpec(
        model_folder=folder,
        base_model=str(folder.resolve()),
        fingerprint=fingerprint(folder, shape),
        task_records=trained.records,
        tasks=trained.tasks,
        num_steps=tuple(trained.num_steps.values()),
        last_step=last_step(state, request.revive, trained.num_steps, request.max_steps),
        max_steps=request.max_steps,
        plan=plan,
        world=setting.world,
        cost_model=training_costs(setting.cost_model, shape, trained.tasks, trained.training),
        output_dir=request.output_dir,
        precision=setting.precision,
        device=device,
        num_buckets=request.num_buckets,
        dynamic_buckets=request.dp_bucket != "off",
        buckets=trained.buckets,
        dispatch_mode=request.dispatch or "balance",
        seed=request.seed,
        batching=batching,
        feedback=setting.feedback,
        validate_every=validate_every,
        save_every=request.save_every,
        keep_checkpoints=request.keep_checkpoints,
        resume_step=None if state is None else state.step,
        revive=request.revive,
        data_day=trained.data_day,
        report_to=setting.report_to,
        profiled_steps=setting.profiled_steps,
        hang_timeout_s=request.hang_timeout,
        deterministic=request.deterministic,
        base_precision=shape.quantised,
        admission=admission,
        replanning=setting.replanning,
    )
