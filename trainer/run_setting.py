"""How a run is carried out: on which device and ranks, how precisely, and what shows it."""

from __future__ import annotations

from dataclasses import dataclass

from lobra.common.errors import Problems
from lobra.layout.base_precision import library_problem, option_problem
from lobra.layout.sequences import Batching
from lobra.layout.world import World
from lobra.profiler.cost_model import CostModel
from lobra.profiler.hardware import product_problem
from lobra.trainer.admission import admission_of
from lobra.trainer.batching import chosen_batching
from lobra.trainer.dispatch_costs import dispatch_costs, missing_profile
from lobra.trainer.model_checks import budget_problems, model_problems
from lobra.trainer.plan_checks import (
    chosen_device,
    common_node_size,
    layout_problems,
    place_plan,
    rank_problems,
)
from lobra.trainer.request import TrainRequest
from lobra.trainer.run_inputs import RunInputs
from lobra.trainer.run_spec import Admission, Replanning
from lobra.trainer.step_trace import steps_of
from lobra.trainer.trackers import trackers_of


@dataclass(frozen=True)
class RunSetting:
    """What was asked for, or is chosen where it was not; None where that cannot be.

    Attributes
    ----------
    device, precision
        "cuda" or "cpu", and what is computed in.
    batching
        How micro-batches hold sequences.
    world
        The plan on its ranks.
    cost_model
        What replicas are balanced with.
    feedback
        Whether measured times decide who computes what.
    admission
        What tasks that join the run are checked against.
    replanning
        How the run is planned anew; None also if it is not to be.
    report_to
        The trackers.
    profiled_steps
        The steps that traces are written of.
    """

    device: str | None
    precision: str
    batching: Batching | None
    world: World | None
    cost_model: CostModel | None
    feedback: bool
    admission: Admission | None
    replanning: Replanning | None
    report_to: tuple[str, ...]
    profiled_steps: frozenset[int]


def chosen_setting(request: TrainRequest, inputs: RunInputs, problems: Problems) -> RunSetting:
    """Return how a run is carried out; ``problems`` gets why it cannot be."""
    config, plan, shape = inputs.config, inputs.plan, inputs.shape
    if plan is not None:
        problems += rank_problems(request, plan)
    if config is not None:
        problems += budget_problems(config.tasks, request.memory_budget)
    report_to = problems.result_of(trackers_of, request.report_to) or ()
    profiled_steps: frozenset[int] = frozenset()
    if request.torch_profiler is not None:
        profiled_steps = problems.result_of(steps_of, request.torch_profiler) or profiled_steps
    device = problems.result_of(chosen_device, request, plan)
    precision = request.precision or ("bf16" if device == "cuda" else "fp32")
    quantised = None if shape is None else shape.quantised
    unusable = (
        option_problem(request.base_precision, precision),
        library_problem(quantised),
        product_problem(quantised, device),
    )
    problems += filter(None, unusable)
    batching = problems.result_of(
        chosen_batching, request.batching, request.dp_bucket, request.dispatch, plan
    )
    world, replanning = None, None
    if plan is not None and device is not None:
        world = problems.result_of(place_plan, plan, request, device)
        if request.replan == "auto":
            num_gpus = request.num_gpus or plan.num_gpus
            replanning = Replanning(request.model, num_gpus, common_node_size(request, device))
    if plan is not None and shape is not None:
        problems += layout_problems(request, plan, shape)
        if config is not None:
            problems += model_problems(config.tasks, plan, shape)
    admission = admission_of(request, config, plan) if config and plan else None
    feedback = request.feedback == "on"
    if request.feedback is None:  # where bits are to repeat, times decide nothing
        feedback = device == "cuda" and not request.deterministic
    cost_model = _cost_model(request, inputs, problems)
    return RunSetting(
        device, precision, batching, world, cost_model, feedback, admission, replanning,
        report_to, profiled_steps,
    )  # fmt: skip


def _cost_model(request: TrainRequest, inputs: RunInputs, problems: Problems) -> CostModel | None:
    """Return what replicas are balanced with; ``problems`` gets why there is nothing."""
    is_named = request.time_profile is not None or inputs.folder is not None
    missing = missing_profile(request) if is_named else []
    problems += missing
    if inputs.plan is None or inputs.shape is None or missing:
        return None
    return problems.result_of(dispatch_costs, request, inputs.plan, inputs.shape.quantised)
