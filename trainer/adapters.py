"""Adapters in and out: gathered from their holders, written and read in PEFT's format."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lobra.common.documents import read_json
from lobra.common.errors import ConfigError, Problems, show
from lobra.common.files import drafted, write_atomic
from lobra.layout.shapes import ModelShape
from lobra.layout.world import World
from lobra.model.adapter import VERA_D, AdapterSpec
from lobra.model.checkpoint import (
    EMBEDDING,
    HEAD,
    PLAIN_DTYPES,
    equal_slices,
    opened,
    tensor_files,
)
from lobra.model.flat_tensors import FlatTensors
from lobra.model.site import PEFT_PREFIX, sites
from lobra.model.stage import Stage
from lobra.model.vera import PROJECTIONS
from lobra.tasks.config import TaskConfig
from lobra.tasks.patterns import patterns_problem
from lobra.tasks.sampling import task_seed
from lobra.trainer.peft_config import config_problems
from lobra.trainer.rank0_folder import Rank0Folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MOMENTS_FILE = "moments.safetensors"
CARD_FILE = "README.md"
#: What PEFT saves of the base, under which name, where adapters are on embedding or head.
BASE_TABLES = {
    PEFT_PREFIX + name.replace(".weight", ".base_layer.weight"): name for name in (EMBEDDING, HEAD)
}


def adapter_spec(task: TaskConfig, run_seed: int = 0) -> AdapterSpec:
    """Return the adapter a task trains in a run with this seed; of a whole model it has none."""
    return AdapterSpec(
        name=task.name,
        rank=task.rank,
        alpha=task.lora_alpha,
        target_modules=() if task.trains_model else task.target_modules,
        dropout=task.lora_dropout,
        seed=task_seed(task, run_seed),
        kind=task.adapter,
        rank_pattern=tuple(task.rank_pattern.items()),
        alpha_pattern=tuple(task.alpha_pattern.items()),
        loraplus_ratio=task.loraplus_ratio,
        projection_seed=task.projection_prng_key,
        modules_to_save=task.modules_to_save,
        bias=task.bias,
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
        if not layout.tensors:
            continue
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
    config = json.dumps(peft_config(spec, base_model), indent=2) + "\n"
    with drafted(folder) as draft:
        save_file(dict(tensors), draft / WEIGHTS_FILE, metadata={"format": "pt"})
        if moments is not None:
            save_moments(draft / MOMENTS_FILE, moments)
        write_atomic(draft / CONFIG_FILE, config)
        # safetensors lets the owner alone read its files; who serves an adapter is another user.
        shutil.copymode(draft / CONFIG_FILE, draft / WEIGHTS_FILE)


def save_moments(path: Path, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a task's moments, by their kind and PEFT's names."""
    flat = {f"{kind}/{name}": t for kind, own in moments.items() for name, t in own.items()}
    save_file(flat, path)


def peft_config(spec: AdapterSpec, base_model: str) -> dict[str, Any]:
    """Return the content of `adapter_config.json`. PiSSA becomes plain LoRA of twice the rank."""
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "target_modules": list(spec.target_modules),
        "bias": spec.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": list(spec.modules_to_save) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    if spec.kind == "vera":
        return {
            "peft_type": "VERA",
            **common,
            "r": spec.rank,
            "vera_dropout": spec.dropout,
            "d_initial": VERA_D,
            "projection_prng_key": spec.projection_seed,
            "save_projection": True,
        }
    twice = 2 if spec.kind == "pissa" else 1
    alpha = twice * spec.alpha
    return {
        "peft_type": "LORA",
        **common,
        "r": twice * spec.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,  # PEFT has integers
        "lora_dropout": spec.dropout,
        "init_lora_weights": True,
        "rank_pattern": {key: twice * own for key, own in spec.rank_pattern},
        "alpha_pattern": {key: twice * own for key, own in spec.alpha_pattern},
        "use_rslora": spec.kind == "rslora",
        "use_dora": spec.kind == "dora",
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
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: tuple(own.get_shape()) for name, own in slices.items()}
            stored = {name: own.get_dtype() for name, own in slices.items()}
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
    with problems.noted():
        spec = replace(spec, target_modules=shape.own_modules(spec.target_modules))
    problems += [
        f"task {spec.name}: resume_from: {config_path}: {problem}"
        for problem in [*_differences(config, spec, shape), *config_problems(config)]
    ]
    problems += [
        f"task {spec.name}: resume_from: {weights_path}: {name} is stored as {dtype}, want one of "
        f"{', '.join(PLAIN_DTYPES)}"
        for name, dtype in stored.items()
        if dtype not in PLAIN_DTYPES
    ]
    drawn = {name: found.pop(name) for name in PROJECTIONS if name in found}
    tables = {name: found.pop(name) for name in BASE_TABLES if name in found}
    adapted = [re.split(r"\.(?:lora|vera)_", name) for name in found]
    modules = {path.rpartition(".")[2] for path, *rest in adapted if rest}
    if modules != set(spec.target_modules):
        problems.add(
            f"task {spec.name}: resume_from: {weights_path} has modules {sorted(modules)}, "
            f"the task says {sorted(spec.target_modules)}"
        )
    if problems:
        return problems
    wanted = FlatTensors.whole(spec, shape).tensors
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
    if not problems and tables:
        problems += [
            f"task {spec.name}: resume_from: {weights_path}: {name} is not the model's own; only "
            f"adapters of the published embedding and head are supported"
            for name in _other_tables(weights_path, tables, shape)
        ]
    if not problems and drawn:
        named, fresh = load_file(weights_path), spec.projections(shape).named()
        problems += [
            f"task {spec.name}: resume_from: {weights_path}: {name} is not what "
            f"projection_prng_key {spec.projection_seed} gives"
            for name in drawn
            if not torch.equal(named[name].float(), fresh[name])
        ]
    if not problems:
        problems += [
            f"task {spec.name}: resume_from: {weights_path}: {name} holds values that are not "
            f"finite; start from another adapter"
            for name in not_finite(load_file(weights_path))
        ]
    return problems


def _other_tables(path: Path, names: Iterable[str], shape: ModelShape) -> list[str]:
    """Return which of the tables that PEFT saves beside adapters of them are not the base's."""
    assert shape.path is not None, "a model that is trained has a folder"
    files, others = tensor_files(shape.path), []
    with opened(path) as saved:
        for name in names:
            own = BASE_TABLES[name] if BASE_TABLES[name] in files else EMBEDDING
            with opened(shape.path / files[own]) as base:
                if not equal_slices(saved.get_slice(name), base.get_slice(own)):
                    others.append(name)
    return others


def _differences(config: Mapping[str, Any], spec: AdapterSpec, shape: ModelShape) -> list[str]:
    """Return what a PEFT configuration says of rank and scale otherwise than the task."""
    method = "VERA" if spec.kind == "vera" else "LORA"
    if config.get("peft_type") != method:
        ours = f"the task says adapter: {spec.kind}, which is {method}"
        return [f"peft_type is {config.get('peft_type')!r}, {ours}"]
    same: dict[str, Any] = {"r": spec.rank}
    if spec.kind == "vera":
        same["projection_prng_key"] = spec.projection_seed
    else:
        same["lora_alpha"] = spec.alpha
    found = [
        f"{field} is {config.get(field)!r}, the task says {value!r}"
        for field, value in same.items()
        if config.get(field) != value
    ]
    if (config.get("bias") or "none") != spec.bias:
        found.append(f"bias is {config.get('bias')!r}, the task says {spec.bias!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or set(map(str, saved)) != set(spec.modules_to_save):
        found.append(f"modules_to_save is {saved!r}, the task says {[*spec.modules_to_save]!r}")
    if spec.kind == "vera":
        return found
    found += [
        f"use_{kind} is {config.get(f'use_{kind}')!r}, the task says adapter: {spec.kind}"
        for kind in ("rslora", "dora")
        if bool(config.get(f"use_{kind}")) != (spec.kind == kind)
    ]
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(field) or {}
        if problem := patterns_problem(pattern):
            found.append(f"{field} is {pattern!r}: {problem}")
            continue
        given: dict[str, Any] = {field: tuple(pattern.items())}
        theirs = replace(spec, **given)
        if any(
            (theirs.rank_at(site), theirs.scaling(site)) != (spec.rank_at(site), spec.scaling(site))
            for site in sites(shape)
            if site.module in spec.target_modules
        ):
            own = dict(getattr(spec, field))
            found.append(f"{field} is {pattern!r}, the task says {own!r}")
    return found


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity."""
    return [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]


def load_weights(folder: Rank0Folder, file: str, stage: Stage, number: int) -> None:
    """Load a task's weights from a file of a folder into this rank's layers. Collective.

    Raises
    ------
    ConfigError
        If a tensor is missing or has another shape, or the file cannot be read.
    """
    try:
        stage.load(number, folder.tensors(file, stage.slots[number].layout.places))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        name = stage.slots[number].spec.name
        raise ConfigError(
            f"task {name}: {folder.path / file}: cannot be loaded ({error})"
        ) from error
