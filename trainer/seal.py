"""A checkpoint's seal: digests of all its files, by which damage is told from what was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lobra.common.models import FileModel


@dataclass(frozen=True)
class Seal(FileModel):
    """SHA-256 of a checkpoint's content.

    Attributes
    ----------
    state
        Of state.json, without the seal itself.
    files
        Of every other file, by its path in the checkpoint.
    """

    state: str
    files: dict[str, str]


def seal_of(folder: Path, state: Mapping[str, Any]) -> Seal:
    """Return the seal of a folder whose state.json is to hold `state` and is not there yet."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return Seal(_of_state(state), {str(path.relative_to(folder)): _of(path) for path in paths})


def broken_by(seal: Seal, folder: Path, state: Mapping[str, Any], state_file: str) -> str | None:
    """Return the first file that is another than was sealed, None if none is."""
    if _of_state(state) != seal.state:
        return state_file
    for name, digest in seal.files.items():
        if not (folder / name).is_file() or _of(folder / name) != digest:
            return name
    return None


def not_finite(path: Path) -> str | None:
    """Return the name of the first tensor of a file that holds NaN or infinity, None without."""
    with safe_open(path, framework="pt") as file:
        for name in list(file.keys()):
            if not file.get_tensor(name).isfinite().all():
                return str(name)
    return None


def _of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_state(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
