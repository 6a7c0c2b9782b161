"""The sidecar of a profile, ``NAME.meta.json`` beside ``NAME.csv``: how its rows were made."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic


def meta_path(path: str | os.PathLike[str]) -> Path:
    """Return the sidecar of a profile: the same name with ``.meta.json`` for ``.csv``."""
    return Path(path).with_suffix(".meta.json")


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the sidecar of the profile at ``path``, or ``{}`` if there is none.

    Raises
    ------
    ConfigError
        If the sidecar is not a JSON object.
    """
    sidecar = meta_path(path)
    if not sidecar.is_file():
        return {}
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{sidecar}: not readable as JSON ({error}); restore it, or remove it with its CSV"
        ) from error
    if not isinstance(meta, dict):
        raise ConfigError(f"{sidecar}: a JSON object is expected, not {type(meta).__name__}")
    return meta


def write_meta(path: str | os.PathLike[str], meta: dict[str, Any]) -> None:
    """Write the sidecar of the profile at ``path``."""
    write_atomic(meta_path(path), json.dumps(meta, indent=2, sort_keys=True) + "\n")


def timestamp() -> str:
    """Return the time as sidecars record it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
