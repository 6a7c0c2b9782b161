"""The sidecar of a profile, ``<name>.meta.json``: how its rows were made.

Only what is read of it has a type here; what else a sidecar notes is kept as it is.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError, Problems
from lobra.common.files import write_atomic
from lobra.common.models import (
    Flag,
    NotNegative,
    Positive,
    PositiveInt,
    Share,
    Text,
    Wanted,
    read_as,
)

PUBLISHED = "published"  # the kind of a profile that others measured and published


class Settings(TypedDict, total=False):
    """Under what the rows were made; a sweep goes on only under the same.

    ``adapters`` are (rank, target modules) of the tasks, ``lora_dropout`` their dropout where one
    has any; ``base_precision`` is what the base's linears were kept in where they were quantised,
    ``label_share`` the share of positions that carried a loss.
    """

    base_precision: Text
    adapters: list[Annotated[tuple[PositiveInt, list[Text]], Field(strict=False)]]
    bytes_per_token: Positive
    gradient_checkpointing: Flag
    label_share: Annotated[
        float, Field(strict=True, gt=0, le=1), Wanted("a number above 0, at most 1")
    ]
    lora_dropout: list[Share]
    max_seq_length: PositiveInt
    memory_budget_bytes: Annotated[
        Positive | Literal["default"], Wanted("a positive number, or default")
    ]


class Environment(TypedDict, total=False):
    """The machine."""

    hardware: dict[str, Any]
    memory_budget_bytes: Positive
    versions: dict[str, Any]


class RowDetails(TypedDict, total=False):
    """How a row was made: the relative spread of its repeats, or what its memory consists of."""

    parts: dict[str, NotNegative]
    spread: NotNegative


class Sidecar(TypedDict, total=False):
    """A sidecar; ``rows`` and ``skipped`` by the rows' keys, joined by commas."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    kind: Text
    settings: Settings
    environment: Environment
    rows: dict[str, RowDetails]
    skipped: dict[str, str]


def meta_path(path: str | os.PathLike[str]) -> Path:
    """Return the sidecar of a profile: the same name with ``.meta.json`` for ``.csv``."""
    return Path(path).with_suffix(".meta.json")


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the sidecar of the profile at ``path``, or ``{}`` if there is none.

    Raises
    ------
    ConfigError
        With every mistake of the sidecar.
    """
    sidecar = meta_path(path)
    if not sidecar.is_file():
        return {}
    problems = Problems()
    try:
        document = read_document(sidecar)
        read_as(Sidecar, document, problems)
        problems.prefixed(f"{sidecar}: ").raise_if_any()
    except ConfigError as error:
        remedy = "; restore it, or remove it with its CSV"
        raise ConfigError(error.problems.changed(lambda problem: problem + remedy)) from None
    return cast(dict[str, Any], document)  # as it is written


def write_meta(path: str | os.PathLike[str], meta: dict[str, Any]) -> None:
    """Write the sidecar of the profile at ``path``."""
    write_atomic(meta_path(path), json.dumps(meta, indent=2, sort_keys=True) + "\n")


def timestamp() -> str:
    """Return the time as sidecars record it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
