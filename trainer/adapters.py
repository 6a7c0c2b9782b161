"""Adapters in and out: gathered from their holders, written and read in PEFT's format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lobra.common.documents import read_json
from lobra.common.errors import ConfigError, Problems, show
from lobra.common.files import new_draft, replace_folder, write_atomic
from lobra.layout.shapes import ModelShape
from lobra.layout.world import World
from lobra.model.adapter import AdapterSpec, FlatTensors
from lobra.model.stage import Stage
from lobra.tasks.config import TaskConfig
from lobra.tasks.sampling import task_seed
from lobra.trainer.peft_config import config_problems

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MOMENTS_FILE = "moments.safetensors"


def adapter_spec(task: TaskConfig, run_seed: int = 0) -> AdapterSpec:
    """Return the adapter a task trains in a run with this seed."""
    return AdapterSpec(
        name=task.name,
        rank=task.rank,
        alpha=task.lora_alpha,
        target_modules=task.target_modules,
        dropout=task.lora_dropout,
        seed=task_seed(task, run_seed),
    )


def gather_tensors(
    own: Mapping[range, Tensor],
    spec: AdapterSpec,
    shape: ModelShape,
    world: World,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return a task's tensors of all layers on rank 0 (CPU, PEFT's), {} elsewhere. Collective.

    ``own`` has, by its layers, the flat tensor of each block that this rank is the first holder of
    (weights, or moments). Each block goes to rank 0 in one piece, over a CPU group, in ``dtype``,
    which is theirs.
    """
    rank = dist.get_rank()
    gathered: dict[str, Tensor] = {}
    for block in world.blocks(shape.num_layers):
        owner = block.holders[0]
        if rank not in (0, owner):
            continue
        layout = FlatTensors.of_layers(spec, shape, block.layers)
        if rank == owner:
            flat = own[block.layers].to("cpu", dtype)
        else:
            flat = torch.empty(layout.numel, dtype=dtype)
        if rank != 0:
            dist.send(flat, 0, group=group)
            continue
        if owner != 0:
            dist.recv(flat, owner, group=group)
        gathered |= {name: value.contiguous() for name, value in layout.named(flat).items()}
    return gathered


def save_adapter(
    folder: Path,
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    base_model: str,
    moments: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` and vLLM load unchanged.

    The folder appears complete or not at all; an older one of that name is there until the moment
    it is replaced. Adam's moments, if given, are in it too.
    """
    draft = new_draft(folder)
    save_file(dict(tensors), draft / WEIGHTS_FILE, metadata={"format": "pt"})
    if moments is not None:
        save_moments(draft / MOMENTS_FILE, moments)
    write_atomic(draft / CONFIG_FILE, json.dumps(peft_config(spec, base_model), indent=2) + "\n")
    replace_folder(draft, folder)


def save_moments(path: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a task's moments, by their kind and PEFT's names."""
    flat = {f"{kind}/{name}": t for kind, own in moments.items() for name, t in own.items()}
    save_file(flat, path)


def peft_config(spec: AdapterSpec, base_model: str) -> dict[str, Any]:
    """Return the content of `adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "target_modules": list(spec.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }


def check_adapter(folder: Path, spec: AdapterSpec, shape: ModelShape) -> Problems:
    """Return what is wrong with starting a task from this PEFT adapter folder (empty: nothing)."""
    config_path = folder / CONFIG_FILE
    weights_path = folder / WEIGHTS_FILE
    missing = [str(path) for path in (config_path, weights_path) if not os.path.isfile(path)]
    if missing:
        return Problems([f"task {spec.name}: resume_from: {', '.join(missing)} not found"])
    try:
        config = read_json(config_path)
        with safe_open(weights_path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    except Exception as error:  # any unreadable file is the same mistake
        return Problems([f"task {spec.name}: resume_from: {folder}: not readable ({error})"])
    if not isinstance(config, dict):
        return Problems(
            [
                f"task {spec.name}: resume_from: {config_path}: holds {show(config)}, want an "
                f"object with the fields of PEFT's LoraConfig"
            ]
        )
    problems = Problems()
    for field, value in {"r": spec.rank, "lora_alpha": spec.alpha}.items():
        if config.get(field) != value:
            problems.add(
                f"task {spec.name}: resume_from: {config_path}: {field} is "
                f"{config.get(field)!r}, the task says {value!r}"
            )
    problems += [
        f"task {spec.name}: resume_from: {config_path}: {problem}"
        for problem in config_problems(config)
    ]
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in found}
    if modules != set(spec.target_modules):
        problems.add(
            f"task {spec.name}: resume_from: {weights_path} has modules {sorted(modules)}, "
            f"the task says {sorted(spec.target_modules)}"
        )
    if problems:
        return problems
    wanted = FlatTensors.of_layers(spec, shape, range(shape.num_layers)).tensors
    wanted_shapes = {tensor.name: tensor.shape for tensor in wanted}
    problems += [
        f"task {spec.name}: resume_from: {weights_path}: {name} is {found.get(name, 'missing')}, "
        f"the model and the task need {size}"
        for name, size in wanted_shapes.items()
        if found.get(name) != size
    ]
    problems += [
        f"task {spec.name}: resume_from: {weights_path}: {name} is of no layer of the model"
        for name in sorted(found.keys() - wanted_shapes.keys())
    ]
    if not problems:
        problems += [
            f"task {spec.name}: resume_from: {weights_path}: {name} holds values that are not "
            f"finite; start from another adapter"
            for name in not_finite(load_file(weights_path))
        ]
    return problems


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]


def load_adapter(folder: Path, stage: Stage, number: int) -> None:
    """Load a PEFT adapter folder into this rank's layers of the task.

    Raises
    ------
    ConfigError
        If a tensor is missing or has another shape.
    """
    try:
        stage.load(number, load_file(folder / WEIGHTS_FILE))
    except (KeyError, ValueError) as error:
        name = stage.slots[number].spec.name
        raise ConfigError(
            f"task {name}: resume_from: {folder / WEIGHTS_FILE} does not fit: {error}"
        ) from error
