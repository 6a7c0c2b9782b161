"""Adapters merged into their base: a model folder of its own, one file of weights at a time.

What PEFT's `merge_and_unload` computes, but in fp32 (fp64 for a base in fp64) and rounded once to
the base's dtype. Several adapters add up as in PEFT's `add_weighted_adapter(..., "cat")`: the
merged update is the weighted sum of theirs. PEFT's "linear" adds the factors A and B instead, which
brings in products of one adapter's B with another's A.

Shape suffixes: I input features, O output features, r LoRA rank.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lobra.common.documents import parsing, read_json
from lobra.common.errors import ConfigError, Problems, show
from lobra.common.files import drafted
from lobra.layout.shapes import read_shape
from lobra.model.checkpoint import EMBEDDING, HEAD, opened, tensor_files
from lobra.model.site import PEFT_PREFIX, matched
from lobra.tasks.patterns import patterns_problem
from lobra.trainer.adapters import CONFIG_FILE, WEIGHTS_FILE, not_finite
from lobra.trainer.peft_config import config_problems

#: What adapters may say beyond `trainer.peft_config`: all of it is found in their tensors.
MERGED_FIELDS = (
    *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save"),
)
#: Of a model folder, what describes the model and its tokenizer; weights are written anew.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
_LOW_RANK = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
_EMBEDDING_FACTOR = re.compile(r"(.+)\.lora_embedding_([AB])")


@dataclass(frozen=True)
class LowRankUpdate:
    """What an adapter adds to a weight [O, I]; with DoRA also the norms [O] its rows then get."""

    A_rI: Tensor
    B_Or: Tensor
    scaling: float
    magnitude_O: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        return self.B_Or.shape[0], self.A_rI.shape[1]

    def applied(self, weight_OI: Tensor, factor: float) -> Tensor:
        """Return the weight with `factor` times the update, in the weight's dtype."""
        A_rI, B_Or = self.A_rI.to(weight_OI.dtype), self.B_Or.to(weight_OI.dtype)
        merged_OI = weight_OI + factor * self.scaling * (B_Or @ A_rI)
        if self.magnitude_O is None:
            return merged_OI
        norms_O = torch.linalg.norm(merged_OI, dim=1)
        return merged_OI * (self.magnitude_O.to(weight_OI.dtype) / norms_O).unsqueeze(1)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder in PEFT's format.

    Attributes
    ----------
    folder
        Where it lies.
    config
        What its adapter_config.json holds.
    tensors
        Its tensors by PEFT's names, without the prefix they all have.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def updates(self) -> dict[str, LowRankUpdate]:
        """What is added to tensors of the base, by their names."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if match := _LOW_RANK.fullmatch(name):
                parts.setdefault(match[1], {})[match[2]] = tensor
            elif match := _EMBEDDING_FACTOR.fullmatch(name):  # of the transposed weight
                part = {"A": "lora_B", "B": "lora_A"}[match[2]]
                parts.setdefault(match[1], {})[part] = tensor.t()
        return {
            f"{module}.weight": LowRankUpdate(
                part["lora_A"],
                part["lora_B"],
                self._scaling(module, len(part["lora_A"])),
                part.get("lora_magnitude_vector"),
            )
            for module, part in parts.items()
        }

    @cached_property
    def replaced(self) -> dict[str, Tensor]:
        """Whole tensors that were trained and take the place of the base's, by their names."""
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in self.tensors.items()
            if not _LOW_RANK.fullmatch(name) and not _EMBEDDING_FACTOR.fullmatch(name)
        }

    @property
    def is_linear(self) -> bool:
        """Whether half of the adapter is half of what it changes."""
        return not self.replaced and all(u.magnitude_O is None for u in self.updates.values())

    def _scaling(self, module: str, rank: int) -> float:
        pattern = tuple((self.config.get("alpha_pattern") or {}).items())
        alpha = matched(pattern, module, self.config["lora_alpha"])
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


def read_adapter(folder: Path) -> SavedAdapter:
    """Return an adapter that can be merged.

    Raises
    ------
    ConfigError
        The folder holds none, or one that is not low-rank updates and trained tensors.
    """
    path = folder / CONFIG_FILE
    try:
        config = read_json(path)
        named = load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # any unreadable file is the same mistake
        raise ConfigError(f"{folder}: no adapter in PEFT's format ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("lora_alpha"), int | float):
        raise ConfigError(f"{path}: holds {show(config)}, want the fields of PEFT's LoraConfig")
    judged = {field: value for field, value in config.items() if field not in MERGED_FIELDS}
    problems = Problems([f"{path}: {problem}" for problem in config_problems(judged)])
    if config.get("peft_type") != "LORA":
        problems.add(f"{path}: peft_type is {config.get('peft_type')!r}, only LORA can be merged")
    problems += [
        f"{folder / WEIGHTS_FILE}: {name} holds values that are not finite"
        for name in not_finite(named)
    ]
    if problem := patterns_problem(config.get("alpha_pattern") or {}):
        problems.add(f"{path}: alpha_pattern: {problem}")
    problems.raise_if_any()
    adapter = SavedAdapter(
        folder, config, {n.removeprefix(PEFT_PREFIX): t for n, t in named.items()}
    )
    with parsing(folder / WEIGHTS_FILE):  # each A needs its B, of two dimensions
        _ = [update.shape for update in adapter.updates.values()]
    return adapter


def merge_problems(
    base: Path, adapters: Sequence[SavedAdapter], factors: Sequence[float]
) -> Problems:
    """Return why adapters cannot be merged into a base with these factors (empty: they can)."""
    model = read_shape(base)
    if model.quantised:
        return Problems(
            [f"{base}: its weights are in {model.quantised}: merge into the model before that"]
        )
    shapes: dict[str, tuple[int, ...]] = {}
    files = tensor_files(base)
    for name in sorted(set(files.values())):
        with opened(base / name) as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    problems = Problems()
    for adapter, factor in zip(adapters, factors, strict=True):
        if not adapter.is_linear and (len(adapters) > 1 or factor != 1):
            problems.add(
                f"{adapter.folder}: has DoRA's magnitudes or tensors trained whole, which cannot "
                f"be weighted or added up: merge it alone, with weight 1"
            )
        changed = {name: tuple(tensor.shape) for name, tensor in adapter.replaced.items()}
        changed |= {name: update.shape for name, update in adapter.updates.items()}
        for name, shape in changed.items():
            if model.tied_embeddings and name in (EMBEDDING, HEAD):
                problems.add(
                    f"{adapter.folder}: changes {name!r}, but embedding and head of {base} are one "
                    f"tensor: merged, both would change"
                )
            elif shapes.get(name) != shape:
                problems.add(
                    f"{adapter.folder}: changes {name!r} {shape}, which in {base} is "
                    f"{shapes.get(name, 'missing')}: it belongs to another base"
                )
    return problems


def write_merged(
    base: Path, adapters: Sequence[SavedAdapter], factors: Sequence[float], target: Path
) -> None:
    """Write a model folder: the base with the adapters, each times its factor, merged into it.

    Weights lie in files of the base's names and dtypes, beside copies of what else describes the
    model. The folder appears complete or not at all. At most one file of weights is in memory.
    """
    with drafted(target) as draft:
        for name in sorted(set(tensor_files(base).values())):
            with opened(base / name) as file:
                merged = {
                    key: _merged(key, file.get_tensor(key), adapters, factors)
                    for key in list(file.keys())
                }
                save_file(merged, draft / name, metadata=file.metadata())
        for path in described(base):
            shutil.copy(path, draft / path.name)


def _merged(
    name: str, tensor: Tensor, adapters: Sequence[SavedAdapter], factors: Sequence[float]
) -> Tensor:
    merged = tensor
    for adapter, factor in zip(adapters, factors, strict=True):
        merged = adapter.replaced.get(name, merged)
        if update := adapter.updates.get(name):
            wide = torch.promote_types(merged.dtype, torch.float32)
            merged = update.applied(merged.to(wide), factor)
    return merged.to(tensor.dtype).contiguous()


def described(base: Path) -> Iterator[Path]:
    """Yield a model folder's files that describe the model and its tokenizer."""
    return (path for pattern in COPIED for path in base.glob(pattern) if path.is_file())
