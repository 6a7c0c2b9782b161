"""What ranks pay to talk to each other: pipeline transfers, all-reduces, adapter synchronisation.

Measured times go to a small CSV, ``kind,ranks,bytes,time`` (ms). A kind and number of ranks is
fitted by a latency and a bandwidth (Hockney, 1994): time = latency + bytes / bandwidth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.csv_rows import MOST, read_rows
from lobra.profiler.profiles import PROFILE_DIR, model_slug
from lobra.profiler.sidecar import read_meta

COLLECTIVE_COLUMNS = ("kind", "ranks", "bytes", "time")
TRANSFER, ALL_REDUCE, SYNC = "transfer", "all_reduce", "sync"
COLLECTIVE_KINDS = (TRANSFER, ALL_REDUCE, SYNC)
ADAPTER_BYTES = 4  # gradients and weights of adapters travel in fp32


@dataclass(frozen=True)
class Link:
    """Time of one collective: ``latency_ms + bytes * ms_per_byte``."""

    latency_ms: float
    ms_per_byte: float

    def time_ms(self, num_bytes: np.ndarray | float) -> np.ndarray:
        """Return ms for messages of so many bytes (array)."""
        return self.latency_ms + self.ms_per_byte * np.asarray(num_bytes, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Collectives:
    """The fitted collectives of one machine.

    Attributes
    ----------
    links
        By (kind, ranks).
    bytes_per_token
        Of the hidden states that one pipeline stage hands to the next.
    meta
        The sidecar.
    """

    links: Mapping[tuple[str, int], Link]
    bytes_per_token: float
    meta: Mapping[str, Any] = field(default_factory=dict)

    def has(self, kind: str) -> bool:
        """Return whether messages of that kind were measured, between any number of ranks."""
        return any(name == kind for name, _ in self.links)

    def transfer_ms(self, tokens: np.ndarray | float) -> np.ndarray:
        """Return ms of handing a micro-batch's hidden states on, and its gradients back."""
        link = self.links.get((TRANSFER, 2))
        if link is None:
            return np.zeros(np.shape(tokens))
        return 2.0 * link.time_ms(np.asarray(tokens) * self.bytes_per_token)

    def all_reduce_ms(self, ranks: int, num_bytes: np.ndarray | float) -> np.ndarray:
        """Return ms of an all-reduce over so many ranks."""
        return self._time_ms(ALL_REDUCE, ranks, num_bytes)

    def sync_ms(self, ranks: int, adapter_elements: float) -> float:
        """Return ms of summing adapters' gradients over the ranks, updating and sharing weights."""
        return float(self._time_ms(SYNC, ranks, ADAPTER_BYTES * adapter_elements))

    def _time_ms(self, kind: str, ranks: int, num_bytes: np.ndarray | float) -> np.ndarray:
        """Interpolate between the numbers of ranks measured: latency by steps, ring bandwidth."""
        counts = sorted(count for name, count in self.links if name == kind)
        if ranks < 2 or not counts:
            return np.zeros(np.shape(num_bytes))
        latency = np.interp(ranks, counts, [self.links[kind, n].latency_ms for n in counts])
        rate = np.interp(ranks, counts, [self.links[kind, n].ms_per_byte for n in counts])
        nearest = min(max(ranks, counts[0]), counts[-1])
        growth = (ranks - 1) / (nearest - 1)  # a ring's steps
        spread = growth * nearest / ranks  # a ring moves 2 (n - 1) / n of the bytes
        return Link(float(latency) * growth, float(rate) * spread).time_ms(num_bytes)


def default_collectives_path(model: str) -> Path:
    """Return ``exp_result/profile/cost_model/profile_collectives_<model>.csv``."""
    return PROFILE_DIR / "cost_model" / f"profile_collectives_{model_slug(model)}.csv"


def load_collectives(path: str | os.PathLike[str]) -> Collectives:
    """Read the CSV and its sidecar (``settings.bytes_per_token``) and fit every kind.

    Raises
    ------
    ConfigError
        With every mistake of the file.
    """
    path = Path(path)
    rows, _ = read_rows(path, COLLECTIVE_COLUMNS, "lobra profile time")
    problems: list[str] = []
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for line, row in rows:
        try:
            kind, ranks = row["kind"], int(row["ranks"])
            num_bytes, time_ms = float(row["bytes"]), float(row["time"])
            if kind not in COLLECTIVE_KINDS:
                raise ValueError(f"kind {kind!r} is none of {', '.join(COLLECTIVE_KINDS)}")
            if not (2 <= ranks <= MOST and 0 < num_bytes <= MOST and 0 < time_ms <= MOST):
                raise ValueError("ranks is at least 2, bytes and time are positive and finite")
        except ValueError as error:
            problems.append(f"{path}: line {line}: {error}")
            continue
        measured.setdefault((kind, ranks), []).append((num_bytes, time_ms))
    meta = read_meta(path)
    bytes_per_token = meta.get("settings", {}).get("bytes_per_token")
    if bytes_per_token is None:
        problems.append(f"{path}: its sidecar lacks settings.bytes_per_token; measure it again")
    if problems:
        raise ConfigError(problems)
    links = {key: fit_link(*np.array(messages).T) for key, messages in measured.items()}
    return Collectives(links, float(bytes_per_token), meta)


def fit_link(num_bytes: np.ndarray, time_ms: np.ndarray) -> Link:
    """Return latency and rate (both non-negative) with the least squared relative error."""
    from scipy.optimize import nnls  # slow to import, and few need it

    scale = num_bytes.max()
    terms = np.stack([np.ones_like(time_ms), num_bytes / scale], axis=1) / time_ms[:, None]
    latency_ms, rate = nnls(terms, np.ones(len(time_ms)))[0]
    return Link(float(latency_ms), float(rate / scale))
