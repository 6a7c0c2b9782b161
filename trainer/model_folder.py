"""A model that was trained as a folder that transformers loads, its files those of its base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from lobra.common.documents import read_json
from lobra.common.files import write_atomic
from lobra.layout.shapes import ModelShape
from lobra.model.checkpoint import INDEX, needed_tensors, tensor_files
from lobra.model.held import Size
from lobra.trainer.merge import described

Files = Mapping[str, Mapping[str, Size]]

#: What transformers calls them in a configuration.
DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def files_of(base: Path, shape: ModelShape) -> dict[str, dict[str, Size]]:
    """Return, by the files that a base has them in, the sizes of all tensors of the model."""
    files = tensor_files(base)
    found: dict[str, dict[str, Size]] = {}
    for name, size in needed_tensors(base, shape).items():
        found.setdefault(files[name], {})[name] = size
    return found


def describe(folder: Path, base: Path, files: Files, precision: str) -> None:
    """Write what is in a model folder beside its weights, which are in ``files``."""
    for path in described(base):
        if path.name != INDEX:
            shutil.copy(path, folder / path.name)
    config = read_json(base / "config.json")
    config = {**config, "dtype": DTYPES[precision]}
    config.pop("torch_dtype", None)  # its older name
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if len(files) > 1:
        weight_map = {name: file for file, sizes in files.items() for name in sizes}
        index = {"metadata": {}, "weight_map": weight_map}
        write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
