"""Where a data set's file is: the data folder, a path, the embedded corpus, or a hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError, did_you_mean
from lobra.common.files import atomic_path
from lobra.tasks.confinement import is_inside
from lobra.tasks.tables import SUFFIXES, without_nulls

#: Data sets that scripts/create_finetune_datasets.sh fetches, by the names LobRA's files use.
PUBLISHED = (
    "dolly",
    "python_code_instructions",
    "evol_instruct",
    "commitpackft",
    "MathInstruct",
    "MetaMathQA",
    "NuminaMath-CoT",
    "PubMedQA",
    "xsum",
    "billsum",
    "cnn_dailymail",
    "meetingbank",
)

_MOST_CHARACTERS = 1000  # of a name
_HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")


def resolve_dataset(dataset_name: str, data_dir: str | Path, confine: Path | None = None) -> Path:
    """Return the file of a data set; mine or fetch it first if it must be.

    Tried in this order: ``<data_dir>/<dataset_name>.jsonl`` and the other suffixes of
    `tasks.tables.SUFFIXES`; the path ``dataset_name``, from the working folder and from
    ``data_dir``; an embedded task, which is mined into ``data_dir``; a hub
    name ``owner/name`` or ``owner/name:configuration``, whose training split is fetched once into
    ``data_dir``. With ``confine`` only files in that folder are looked at.

    Raises
    ------
    ConfigError
        If there is none, with the places looked at and how to get it; or if the hub fails.
    """
    from lobra.tasks.corpus import EMBEDDED, ensure_corpus

    if len(dataset_name) > _MOST_CHARACTERS:
        raise ConfigError(
            f"dataset_name = {dataset_name[:60]!r} and more: no such data set: names have at most "
            f"{_MOST_CHARACTERS} characters"
        )
    data_dir = Path(data_dir)
    hub_name = _HUB_NAME.fullmatch(dataset_name)
    looked = [data_dir / f"{dataset_name}{suffix}" for suffix in SUFFIXES]
    looked += [Path(dataset_name), data_dir / dataset_name]
    if hub_name:
        looked.append(data_dir / f"{re.sub(r'[/:]', '--', dataset_name)}.jsonl")
    num_looked = len(looked)
    looked = [path for path in looked if is_inside(path, confine)]
    if len(looked) < num_looked and not any(map(os.path.isfile, looked)):
        raise ConfigError(
            f"dataset_name = {dataset_name!r}: no such data set in {confine} (--confine)"
        )
    for path in looked:
        if os.path.isfile(path):  # False, not an error, for names no file can have
            return path
    for path in looked[len(SUFFIXES) :]:
        if dataset_name not in (".", "/") and os.path.isdir(path):
            raise ConfigError(
                f"dataset_name = {dataset_name!r}: {path} is a folder, want a file: name its files "
                "in a list, or convert it, for example by "
                "datasets.load_from_disk(...).to_json('data.jsonl')"
            )
    if dataset_name in EMBEDDED:
        return ensure_corpus(data_dir)[dataset_name]
    if hub_name and not dataset_name.endswith(SUFFIXES):
        return _fetch(hub_name[1], hub_name[2], looked[-1])
    raise ConfigError(
        f"dataset_name = {dataset_name!r}: no such data set: looked for {looked[0]} (or "
        f"{', '.join(SUFFIXES[1:])}), "
        f"{', '.join(str(path) for path in looked[len(SUFFIXES) :])}; "
        f"{_remedy(dataset_name, data_dir)}"
    )


def _remedy(dataset_name: str, data_dir: Path) -> str:
    from lobra.tasks.corpus import EMBEDDED

    if dataset_name in PUBLISHED:
        return f"get it with: bash scripts/create_finetune_datasets.sh {dataset_name}"
    files = sorted(path for path in data_dir.glob("*") if path.suffix in SUFFIXES)
    present = [path.stem for path in files]
    hint = did_you_mean(dataset_name, [*present, *EMBEDDED, *PUBLISHED])
    shown = ", ".join(present[:20]) if present else "no data file"
    return (
        f"{data_dir}/ has {shown}{hint}: put the file there, give its path, or use a hub name "
        f"(owner/name) or an embedded task ({', '.join(EMBEDDED)})"
    )


def _fetch(name: str, configuration: str | None, path: Path) -> Path:
    """Write the training split of a hub data set to ``path``, a row per line, and return it."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            f"dataset_name = {name!r}: hub data sets need the package `datasets` ({error})"
        ) from error
    try:
        rows: Any = load_dataset(name, configuration, split="train")
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                line = json.dumps(without_nulls(row), ensure_ascii=False, default=str)
                file.write(line + "\n")
    except Exception as error:  # network, access, unknown name: the library has dozens of its own
        raise ConfigError(
            f"dataset_name = {name!r}: not a file, and the hub gave none: "
            f"{type(error).__name__}: {error}"
        ) from error
    return path
