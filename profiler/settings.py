"""Settings of a sweep: what of a model and its adapters costs depend on, as sidecars have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lobra.layout.shapes import ModelShape
from lobra.tasks.config import TaskConfig

if TYPE_CHECKING:
    from lobra.model.adapter import AdapterSpec

#: The kinds of adapter that cost what LoRA of their rank costs.
LOW_RANK = ("lora", "rslora")


def adapter_specs(tasks: Sequence[TaskConfig]) -> tuple[AdapterSpec, ...]:
    """Return the adapters of tasks."""
    from lobra.model.adapter import AdapterSpec

    return tuple(
        AdapterSpec(
            task.name,
            task.rank,
            task.lora_alpha,
            task.target_modules,
            task.lora_dropout,
            task.seed,
            task.adapter,
            tuple(task.rank_pattern.items()),
            modules_to_save=task.modules_to_save,
            bias=task.bias,
        )
        for task in tasks
    )


def adapter_settings(tasks: Sequence[TaskConfig]) -> dict[str, Any]:
    """Return what of the tasks' adapters costs depend on, as a sidecar's settings have it."""
    settings: dict[str, Any] = {
        "adapters": [[task.largest_rank, list(task.target_modules)] for task in tasks]
    }
    if any(task.lora_dropout > 0.0 for task in tasks):
        settings["lora_dropout"] = [task.lora_dropout for task in tasks]
    if any(task.adapter not in LOW_RANK for task in tasks):
        settings["adapter"] = [task.adapter for task in tasks]
    return settings


def shape_settings(shape: ModelShape) -> list[int]:
    """Return the sizes of a model that its costs depend on."""
    return [
        shape.num_layers,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.vocab_size,
    ]


def model_settings(shape: ModelShape) -> dict[str, Any]:
    """Return what of a model costs depend on, as a sidecar's settings have it."""
    quantised = {} if shape.quantised is None else {"base_precision": shape.quantised}
    return {"model": shape.name, "shape": shape_settings(shape), **quantised}
