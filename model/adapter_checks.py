"""Whether a model can have the adapters of tasks: asked where runs are planned and started.

Nothing is imported that a base installation lacks, but for vectors of a base that are trained.
"""

from __future__ import annotations

import logging

from lobra.common.errors import Problems
from lobra.layout.shapes import ModelShape
from lobra.model.base_vectors import base_vectors, is_trained_bias, is_trained_norm
from lobra.model.site import matched, sites
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import EMBEDDING, HEAD
from lobra.tasks.task_file import TrainerConfig

log = logging.getLogger(__name__)


def task_file_problems(config: TrainerConfig, shape: ModelShape) -> Problems:
    """Return what of the adapters of a file's tasks a model cannot have, each with its place."""
    problems = Problems()
    for number, task in zip(config.numbers, config.tasks, strict=True):
        problems += adapter_problems(task, shape).prefixed(f"{config.path}: task[{number}].")
    return problems


def adapter_problems(task: TaskConfig, shape: ModelShape) -> Problems:
    """Return what of a task's adapter a model cannot have, each with its field (empty: nothing)."""
    problems = Problems()
    modules: tuple[str, ...] = ()
    with problems.noted():
        modules = shape.own_modules(task.target_modules)
    problems = problems.prefixed("target_modules: ")
    if modules:
        problems += _low_rank_problems(task, modules, shape)
    if task.modules_to_save or task.bias != "none":
        with problems.noted():
            problems += _vector_problems(task, modules, shape)
    return problems


def _low_rank_problems(task: TaskConfig, modules: tuple[str, ...], shape: ModelShape) -> list[str]:
    """Return what is wrong with an adapter on these modules of the model."""
    own = [site for site in sites(shape) if site.module in modules]
    found = [
        f"{field}: {pattern!r} fits nothing that the adapter is on"
        for field in ("rank_pattern", "alpha_pattern")
        for pattern, value in getattr(task, field).items()
        if not any(matched(((pattern, value),), site.path, None) for site in own)
    ]
    if EMBEDDING in modules and task.adapter not in ("lora", "rslora"):
        found.append(
            f"adapter: {task.adapter} is not supported on {EMBEDDING}; want lora or rslora"
        )
    largest_rank = max([task.rank, *task.rank_pattern.values()])
    if task.adapter == "pissa":
        found += _pissa_problems(largest_rank, modules, shape)
    widest = max(max(shape.module_sizes()[module]) for module in modules)
    if largest_rank > widest:
        found.append(
            f"rank = {largest_rank}: want at most {widest}, the width of the widest module it is on"
        )
    return found


def _pissa_problems(largest_rank: int, modules: tuple[str, ...], shape: ModelShape) -> list[str]:
    """Return why an adapter cannot start from principal parts of the model's weights."""
    found = []
    if shape.quantised:
        found.append(
            f"adapter: pissa starts from the weights themselves, not from a base in "
            f"{shape.quantised}: want another kind of adapter, or a base that is not quantised"
        )
    most = min(min(shape.module_sizes()[module]) for module in modules)
    if largest_rank > most:
        found.append(
            f"rank: {largest_rank} is more than a weight of the model has principal components: "
            f"at most {most} with adapter: pissa"
        )
    if HEAD in modules and shape.tied_embeddings:
        found.append(
            f"adapter: pissa takes its start out of the weight, which {HEAD} and {EMBEDDING} of "
            f"{shape.name} share: remove {HEAD} from target_modules"
        )
    return found


def _vector_problems(task: TaskConfig, modules: tuple[str, ...], shape: ModelShape) -> list[str]:
    """Return which vectors that the task trains as they are the model does not have."""
    try:
        names = [name for own in base_vectors(shape).values() for name in own]
    except ModuleNotFoundError as error:
        log.warning(
            "task %s: whether %s has what modules_to_save and bias name was not looked at: %s is "
            "not installed",
            task.name, shape.name, error.name,
        )  # fmt: skip
        return []
    found = [
        f"modules_to_save: {key!r} fits no norm of {shape.name}; only norms are trained as they are"
        for key in task.modules_to_save
        if not any(is_trained_norm((key,), name) for name in names)
    ]
    if task.bias != "none" and not any(is_trained_bias(task.bias, modules, name) for name in names):
        found.append(f"bias: {task.bias}, but {shape.name} has no such biases; want none")
    return found
