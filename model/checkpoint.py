"""Lazy reading of a Hugging Face checkpoint: each rank reads only the slices it needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.shapes import ModelShape, module_path
from tasks.errors import ConfigError, Problems

WHOLE = slice(None)
INDEX = "model.safetensors.index.json"
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def tensor_files(folder: Path) -> dict[str, str]:
    """Return {tensor name: file name} of a model folder with one or several safetensors files.

    Raises:
        ConfigError: there are none, the index or a file is damaged, or a file is missing.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{index}: no usable weight_map ({error!r})") from error
        missing = sorted({name for name in files.values() if not (folder / name).is_file()})
        if missing:
            raise ConfigError(
                [f"{folder / name}: named in {INDEX} but missing" for name in missing]
            )
        return files
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as file:
            files.update(dict.fromkeys(file.keys(), path.name))
    if not files:
        raise ConfigError(f"{folder}: no safetensors weights found")
    return files


def opened(path: Path) -> Any:
    """Return the opened safetensors file.

    Raises:
        ConfigError: the file is damaged or cut short.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a usable safetensors file ({error})") from error


def checkpoint_problems(folder: Path, shape: ModelShape) -> Problems:
    """Return what is wrong with a model folder's weights (empty: nothing); reads no tensor."""
    try:
        files = tensor_files(folder)
        found: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for name in sorted(set(files.values())):
            with opened(folder / name) as file:
                for key in list(file.keys()):
                    part = file.get_slice(key)
                    found[key], dtypes[key] = tuple(part.get_shape()), part.get_dtype()
    except ConfigError as error:
        return error.problems
    problems = Problems()
    for name, wanted in _expected_tensors(shape).items():
        if name not in found:
            problems.add(f"{folder}: the checkpoint has no tensor {name!r}")
        elif found[name] != wanted:
            problems.add(
                f"{folder}: tensor {name!r} is {found[name]}, config.json implies {wanted}"
            )
    problems += [
        f"{folder}: tensor {name!r} is stored as {dtype}; quantised weights are not read, use the "
        f"unquantised model"
        for name, dtype in dtypes.items()
        if name.endswith((".weight", ".bias")) and dtype not in PLAIN_DTYPES
    ]
    return problems


def _expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that every supported family has."""
    table = (shape.vocab_size, shape.hidden_size)
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": (shape.hidden_size,),
    }
    if not shape.tied_embeddings:
        expected["lm_head.weight"] = table
    for layer in range(shape.num_layers):
        for module, (inputs, outputs) in shape.linear_sizes().items():
            expected[f"model.layers.{layer}.{module_path(module)}.weight"] = (outputs, inputs)
    return expected


@dataclass
class CheckpointReader:
    """Opens the safetensors files of a model folder on demand and reads slices of tensors.

    `loaded_bytes` counts what was read, so that a test can hold a rank to its own share.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    loaded_bytes: int = 0
    _files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._files = tensor_files(self.folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, rows: slice = WHOLE, columns: slice | None = None) -> Tensor:
        """Return `tensor[rows]` or `tensor[rows, columns]` in this reader's dtype and device.

        Raises:
            ConfigError: the checkpoint has no such tensor, or its file is damaged.
        """
        if name not in self._files:
            raise ConfigError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        # Opened for this tensor only: the pages of a file that stays mapped would add up to much
        # more than this rank's share.
        with opened(self.folder / self._files[name]) as file:
            lazy = file.get_slice(name)
            part: Tensor = lazy[rows] if columns is None else lazy[rows, columns]
            # A slice may be a view into the file's map; own exactly our share.
            tensor = part.to(dtype=self.dtype, device=self.device, copy=True)
        self.loaded_bytes += tensor.numel() * part.element_size()
        return tensor


def as_slice(part: range) -> slice:
    """Return a contiguous range as a slice."""
    return slice(part.start, part.stop)
