"""Sequence lengths instead of data sets, so that planning needs no data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lobra.common.documents import MOST_BYTES, check_regular, read_json, reading
from lobra.common.errors import ConfigError, Problems, show

Lengths = NDArray[np.int64]
#: Instead of a file: lengths like those of LobRA's data sets (`tasks.published_lengths`).
PUBLISHED_LENGTHS = Path("published")
MOST_TOKENS = 2**40  # of a sequence: what a plan is made for are lengths cut to a context


def load_lengths(path: str | Path) -> dict[str, Lengths]:
    """Return every task's sequence lengths in tokens, int64 [num_sequences], by the task's name.

    Parameters
    ----------
    path
        A JSON file ``{"<task>": [int, ...]}``, or a folder with one ``<task>.npy`` per task; or
        "published", for lengths like those of LobRA's twelve data sets.

    Raises
    ------
    ConfigError
        Naming every task whose lengths are not positive integers.
    """
    path = Path(path)
    if path == PUBLISHED_LENGTHS and not path.exists():
        from lobra.tasks.published_lengths import MIXTURES, published_lengths

        return {name: published_lengths(name) for name in MIXTURES}
    if os.path.isdir(path):
        found = _load_folder(path)
    elif os.path.isfile(path):
        found = _load_json(path)
    else:
        raise ConfigError(
            f"no lengths at {path}: want a JSON file of lists of integers by task, "
            'or a folder with one .npy file per task, or "published" (lengths '
            "like those of LobRA's data sets)"
        )
    problems: list[str] = []
    lengths = {name: _check(values, where, problems) for name, (where, values) in found.items()}
    if problems:
        raise ConfigError(problems)
    return lengths


def _load_json(path: Path) -> dict[str, tuple[str, Any]]:
    document = read_json(path)
    if not isinstance(document, dict) or not document:
        raise ConfigError(f"{path}: want an object with a list of lengths for each task")
    return {name: (f"{path}: {name}", values) for name, values in document.items()}


def _load_folder(path: Path) -> dict[str, tuple[str, Any]]:
    files = sorted(path.glob("*.npy"))
    if not files:
        raise ConfigError(f"{path}: no .npy file in this folder, want one per task")
    found: dict[str, tuple[str, Any]] = {}
    problems = Problems()
    for file in files:
        with problems.noted(), reading(file):
            check_regular(file, MOST_BYTES)
            with file.open("rb") as content:
                values = np.lib.format.read_array(content, allow_pickle=False)
            found[file.stem] = (str(file), values)
    problems.raise_if_any()
    return found


def _check(values: Any, where: str, problems: list[str]) -> Lengths:
    """Return the lengths as an array; report what is no flat list of positive integers."""
    nothing = np.empty(0, dtype=np.int64)
    if isinstance(values, list):
        for index, value in enumerate(values):
            if not isinstance(value, int) or isinstance(value, bool):
                problems.append(f"{where}[{index}] = {show(value)}: want a positive integer")
                return nothing
        try:
            array = np.array(values, dtype=np.int64)
        except OverflowError:
            problems.append(f"{where}: holds an integer beyond 64 bits, want lengths in tokens")
            return nothing
    elif isinstance(values, np.ndarray):
        if values.ndim != 1 or values.dtype.kind not in "iu":
            problems.append(
                f"{where}: is {values.dtype} of shape {values.shape}, want integers of one axis"
            )
            return nothing
        array = values.astype(np.int64)
    else:
        problems.append(f"{where} = {values!r:.60}: want a list of lengths")
        return nothing
    if not len(array):
        problems.append(f"{where}: is empty, want at least one length")
    elif array.max() > MOST_TOKENS:
        index = int(np.argmax(array > MOST_TOKENS))
        problems.append(f"{where}[{index}] = {array[index]}: want at most {MOST_TOKENS} tokens")
    elif array.min() < 1:
        index = int(np.argmax(array < 1))
        problems.append(f"{where}[{index}] = {array[index]}: want a positive integer")
    return array
