"""Lazy reading of a Hugging Face checkpoint: each rank reads only the slices it needs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tasks.errors import ConfigError

WHOLE = slice(None)


@dataclass
class CheckpointReader:
    """Opens the safetensors files of a model folder on demand and reads slices of tensors.

    `loaded_bytes` counts what was read, so that a test can hold a rank to its own share.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    loaded_bytes: int = 0
    loaded_names: set[str] = field(default_factory=set)
    _files: dict[str, str] = field(default_factory=dict)
    _open: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self._files = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (KeyError, ValueError) as error:
                raise ConfigError(f"{index}: no usable weight_map ({error!r})") from error
        else:
            for path in sorted(self.folder.glob("*.safetensors")):
                with safe_open(path, framework="pt") as file:
                    self._files.update(dict.fromkeys(file.keys(), path.name))
        if not self._files:
            raise ConfigError(f"{self.folder}: no safetensors weights found")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, rows: slice = WHOLE, columns: slice | None = None) -> Tensor:
        """Return `tensor[rows]` or `tensor[rows, columns]` in this reader's dtype and device.

        Raises:
            ConfigError: the checkpoint has no such tensor, or its file is missing.
        """
        if name not in self._files:
            raise ConfigError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        file = self._files[name]
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise ConfigError(f"{path}: named in the checkpoint's index but missing")
            self._open[file] = safe_open(path, framework="pt")
        lazy = self._open[file].get_slice(name)
        tensor: Tensor = lazy[rows] if columns is None else lazy[rows, columns]
        self.loaded_bytes += tensor.numel() * tensor.element_size()
        self.loaded_names.add(name)
        # .clone(): a slice may be a view into the file's memory map; own exactly our share.
        return tensor.to(dtype=self.dtype, device=self.device).clone()

    def close(self) -> None:
        """Forget the open files."""
        self._open.clear()


def as_slice(part: range) -> slice:
    """Return a contiguous range as a slice."""
    return slice(part.start, part.stop)
