"""Whether a run can train its model whole, known before it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lobra.common.errors import ConfigError
from lobra.common.storage import shown_bytes
from lobra.layout.plan import Plan
from lobra.layout.shapes import ModelShape
from lobra.profiler.memory import parse_bytes
from lobra.profiler.model_memory import model_memory
from lobra.tasks.config import TaskConfig
from lobra.tasks.kinds import ADAMW_8BIT
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.zero import kept_moments, moment_bytes

log = logging.getLogger(__name__)


def model_problems(tasks: Sequence[TaskConfig], plan: Plan, shape: ModelShape) -> list[str]:
    """Return why a run cannot train its model whole (empty: it can, or is not to)."""
    whole = [task.name for task in tasks if task.trains_model]
    if not whole:
        return []
    problems = []
    if len(tasks) > 1:
        problems.append(
            f"task {whole[0]}: adapter: full trains the base itself, which the other "
            f"{len(tasks) - 1} tasks would share: give it a task file of its own"
        )
    if shape.quantised is not None:
        problems.append(
            f"task {whole[0]}: adapter: full trains weights, which {shape.quantised} are not made "
            f"for: leave --base-precision out, and use an unquantised model"
        )
    layouts = {group.layout for group in plan.groups}
    if len(layouts) > 1:
        problems.append(
            f"task {whole[0]}: adapter: full wants replicas that are all alike, the plan has "
            f"{', '.join(sorted(map(str, layouts)))}"
        )
    for layout in sorted(layouts):
        if shape.tied_embeddings and layout.pp > 1:
            problems.append(
                f"task {whole[0]}: adapter: full: embedding and head of {shape.name} are one "
                f"tensor, which {layout} has on two stages: want pp 1"
            )
        if shape.num_kv_heads % layout.tp:
            problems.append(
                f"task {whole[0]}: adapter: full: {layout} has some of the "
                f"{shape.num_kv_heads} key heads of {shape.name} on several ranks: want a tp that "
                f"divides them"
            )
    return problems


def budget_problems(tasks: Sequence[TaskConfig], budget: str | None) -> list[str]:
    """Return a problem if there is a budget but no task that it is for."""
    if budget is None or any(task.trains_model for task in tasks):
        return []
    return [
        f"--memory-budget {budget}: only a task with adapter: full is held to it; what adapters "
        f"take is in the plan's max_tokens"
    ]


def check_memory(run: RunSpec, shape: ModelShape, budget: str | None) -> None:
    """Tell what a model that is trained whole will take of a rank, and refuse what is too much.

    The bound is the budget that is given, else a GPU's memory; on a CPU there is none.

    Raises
    ------
    ConfigError
        A rank is predicted to take more, or the budget is no size.
    """
    if not run.trains_model:
        return
    import torch

    (task,) = run.tasks
    replicas, tokens = len(run.plan.replicas), run.plan.max_tokens
    layout = run.plan.groups[0].layout
    memory = model_memory(
        shape, layout, replicas, run.precision,
        moment_bytes(task.optimizer, task.momentum), task.offload,
        len(kept_moments(task)) if task.optimizer == ADAMW_8BIT and not task.offload else 0,
    )  # fmt: skip
    needed = memory.total_bytes(tokens)
    parts = (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes)
    weights, gradients, optimizer = (shown_bytes(int(part)) for part in parts)
    told = (
        f"{layout} x {replicas} in {run.precision} takes {shown_bytes(needed)} a rank: {weights} "
        f"of weights, {gradients} of gradients, {optimizer} of the optimiser's"
        f"{' (more on the host)' if task.offload else ''}, the rest for micro-batches of {tokens} "
        f"tokens and the exchange"
    )
    most = None if budget is None else parse_bytes(budget)
    if budget is None and run.device == "cuda":
        most = torch.cuda.get_device_properties(0).total_memory
    if most is not None and needed > most:
        raise ConfigError(
            f"task {task.name}: adapter: full: {told}; there are {shown_bytes(most)}: want more "
            f"replicas, a larger tp or pp, a smaller max_tokens, --memory full, or offload: true"
        )
    log.info("task %s: %s", task.name, told)
