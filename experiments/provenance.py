"""What an experiment's tables were made from: provenance.json, and the tables it answers for."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lobra.common.options import option_name

PROVENANCE = "provenance.json"
MADE_FROM = ("model", "steps", "seed", "time_limit_s")
TABLES = (
    *("lengths", "methods", "steps", "sequential", "ablation", "buckets", "timeline"),
    *("planning_time", "homogeneous_steps", "throughput", "scale_gpus", "scale_tasks", "runs"),
)


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return what a folder's tables were made from; empty if that is not known."""
    try:
        found = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def same_sources(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two provenances say that tables were made from the same things."""
    if any(one.get(name) != other.get(name) for name in MADE_FROM):
        return False
    return bool(one.get("inputs", {}).get("main") == other.get("inputs", {}).get("main"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return a table's rows as texts; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def git_state(root: Path) -> dict[str, Any]:
    """Return the commit and whether tracked files differ from it; nothing outside a checkout."""
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": commit, "changed_since_commit": bool(status)}


def now() -> str:
    """Return the time, in UTC, to the minute."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def words_of(options: Any) -> list[str]:
    """Return a dataclass of options as words of a command line, defaults left out."""
    words = []
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            words += words_of(value)
        elif value != field.default:
            for one in value if isinstance(value, tuple) else (value,):
                name = [option_name(field)] if field.kw_only else []
                words += name if one is True else [*name, str(one)]
    return words
