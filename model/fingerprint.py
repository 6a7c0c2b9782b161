"""What tells base models apart: a digest of what the model computes with, cheap at any size."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobra.common.documents import read_json
from lobra.common.errors import ConfigError
from lobra.layout.shapes import ModelShape
from lobra.model.checkpoint import needed_tensors, tensor_files
from lobra.model.quantised_checkpoint import quantised_weight_of

MARK = "tensors:"  # of this method; without a mark it is that of `_of_file_starts`
MOST_BYTES = 64 << 20  # read of a model, so within a second or two, on a network too
PIECE_BYTES = 16 << 10  # that many are read at a time: 4,096 reads at most
SAMPLED_START = 1 << 20
# Fields of config.json that say nothing about what the model computes; all others count.
WITHOUT_EFFECT = (
    *("_name_or_path", "_commit_hash", "architectures", "transformers_version", "use_cache"),
    *("dtype", "torch_dtype", "initializer_range", "auto_map", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True)
class _Place:
    """A tensor's bytes: `size` of them from `start` on in a file."""

    path: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def fingerprint(folder: Path, shape: ModelShape, like: str = MARK) -> str:
    """Return the fingerprint of a base model, made by the method that `like` was made by.

    It covers the fields of config.json that matter and, of every tensor the model uses, its name,
    dtype, shape and bytes. A model of up to 64 MiB is read whole. Of a larger one every tensor is
    read in as many pieces of 16 KiB as that budget allows (a 70B model's 723 tensors: 5 each),
    evenly spaced, its first and last bytes among them. So it does not depend on how the tensors lie
    in files, and fine-tuning, merging an adapter, another release or rounding, which change nearly
    every value of a tensor, are seen in whichever tensor they touch. It cannot see a change that is
    confined to what lies between the pieces: single values, or a few rows of an embedding. Reading
    all would take minutes at every start (140 GB for 70B), and a digest remembered by path, size
    and time of change trusts those more than this trusts five samples.

    Raises
    ------
    ConfigError
        The weights are missing or damaged.
    """
    if not like.startswith(MARK):
        return _of_file_starts(folder)
    config = read_json(folder / "config.json")
    counted = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode())
    files, headers = tensor_files(folder), {}
    places = {}
    needed = needed_tensors(folder, shape).keys()
    for name in sorted(name for name in files if (quantised_weight_of(name) or name) in needed):
        path = folder / files[name]
        if path not in headers:
            headers[path] = _places(path)
        if name not in headers[path]:
            raise ConfigError(f"{path}: has no tensor {name!r}, though the index says so")
        places[name] = headers[path][name]
    whole = sum(place.size for place in places.values()) <= MOST_BYTES
    pieces = max(1, MOST_BYTES // (PIECE_BYTES * max(1, len(places))))
    for name, place in places.items():
        digest.update(f"\0{name} {place.dtype} {place.shape}\0".encode())
        with place.path.open("rb", buffering=0) as file:
            for start, size in [(0, place.size)] if whole else _spread(place.size, pieces):
                digest.update(_read(file.fileno(), place.start + start, size, place.path))
    return MARK + digest.hexdigest()[:32]


def _spread(size: int, pieces: int) -> list[tuple[int, int]]:
    """Return (start, bytes) of evenly spaced pieces of a tensor of `size` bytes."""
    if size <= pieces * PIECE_BYTES:
        return [(0, size)]
    last = size - PIECE_BYTES
    if pieces == 1:
        return [(last // 2, PIECE_BYTES)]
    return [(last * number // (pieces - 1), PIECE_BYTES) for number in range(pieces)]


def _read(descriptor: int, start: int, size: int, path: Path) -> bytes:
    """Return these bytes of a file; a map of it would die of a file that is cut meanwhile."""
    parts = []
    while size:
        part = os.pread(descriptor, size, start)
        if not part:
            raise ConfigError(f"{path}: is cut short")
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def _places(path: Path) -> dict[str, _Place]:
    """Return where a safetensors file has its tensors (8 bytes of length, JSON, the bytes)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
        places = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                place = 8 + length + first, end - first, entry["dtype"], tuple(entry["shape"])
                places[name] = _Place(path, *place)
        return places
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise ConfigError(f"{path}: not a usable safetensors file ({error!r})") from error


def _of_file_starts(folder: Path) -> str:
    """Return the fingerprint that older checkpoints hold: of sizes and the first MiB of files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(SAMPLED_START))
    return digest.hexdigest()[:16]
