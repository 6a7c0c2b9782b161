"""Tokenised data kept between runs, so that plan, train and resume tokenise once.

An entry is named by a digest of all it was made from: the data files' bytes, the tokenizer's
files, the task's settings, the versions of the tokenizer libraries and the code of this package.
What is damaged or cannot be written is as good as absent: the data are tokenised again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.common.errors import ConfigError
from lobra.common.files import new_draft, remove_folder, replace_folder, write_atomic
from lobra.common.version import installed_version
from lobra.tasks.data_report import DataReport

if TYPE_CHECKING:
    from lobra.tasks.config import TaskConfig
    from lobra.tasks.dataset import TokenizedDataset

log = logging.getLogger(__name__)

MOST_BYTES = 20 << 30  # of all entries; those not used for longest go first
_REPORT = "report.json"


def cache_folder() -> Path:
    """Return where entries lie: ``lobra/tokenised`` in the user's cache folder (XDG)."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lobra" / "tokenised"


def digest_of(files: Sequence[Path], made_from: Mapping[str, Any]) -> str:
    """Return the name of the entry made from these data files and plain values."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode())
    digest.update(_code_digest().encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:40]


@cache
def _code_digest() -> str:
    """Return a digest of the code that turns rows into tokens, and of the libraries it uses."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for package in ("transformers", "tokenizers", "jinja2"):
        digest.update(f"{package} {installed_version(package)}".encode())
    return digest.hexdigest()


def read_entry(name: str, task: TaskConfig) -> TokenizedDataset | None:
    """Return an entry's data with its report, None if there is none that is whole."""
    from lobra.tasks.dataset import TokenizedDataset

    folder = cache_folder() / name
    if not folder.is_dir():
        return None
    try:
        data = TokenizedDataset.load(folder)
        report = DataReport.from_plain(task, json.loads((folder / _REPORT).read_text("utf-8")))
        os.utime(folder)
    except (ConfigError, OSError, ValueError, KeyError, TypeError) as error:
        log.info("%s: not usable (%s): the data are tokenised again", folder, error)
        return None
    return replace(data, report=report)


def write_entry(name: str, data: TokenizedDataset) -> None:
    """Keep a data set under a name, and remove what makes the entries too large together."""
    assert data.report is not None
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        draft = new_draft(root / name)
        data.save(draft)
        write_atomic(draft / _REPORT, json.dumps(data.report.as_plain(), ensure_ascii=False))
        replace_folder(draft, root / name)
        _prune(root, keep=name)
    except OSError as error:
        log.info("%s: tokenised data are not kept for the next run (%s)", root, error)


def _prune(root: Path, keep: str) -> None:
    entries = [path for path in root.iterdir() if path.is_dir() and path.name != keep]
    entries.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in (root / keep, *entries):
        total += sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        if total > MOST_BYTES and path.name != keep:
            remove_folder(path)
