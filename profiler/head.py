"""Embedding and head: what they cost, by the tokens and by those of them that carry a loss.

The logits are computed for positions with a label only: prompts and padding have none, and they
are anything from half to nearly all of a data set. So two times are measured per shape: without a
label (embedding, norm and their gradients), and with labels on a known share of the positions. The
difference is what the labels cost, and grows in proportion to their number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.csv_rows import finite_ms, read_rows
from lobra.profiler.layer_fit import LayerFit, fit_layer
from lobra.profiler.profiles import TIME_COLUMNS, TimeProfile, load_time_profile

Array = np.ndarray

# Time without labels, and with labels on a share of the positions (both ms).
HEAD_COLUMNS = (*TIME_COLUMNS[:3], "time_without_labels", "time")
PROFILED_SHARE = 0.5  # of the positions, in the time measured with labels
SMALLEST_LOSS_MS = 1e-6


@dataclass(frozen=True)
class HeadFit:
    """The fitted time of embedding and head of one tensor-parallel size.

    Attributes
    ----------
    base
        Without labels; None if that was not measured.
    labels
        What labels on ``profiled_share`` of the positions add (or all of it, without ``base``).
    profiled_share
        In (0, 1].
    """

    base: LayerFit | None
    labels: LayerFit
    profiled_share: float = PROFILED_SHARE

    def time_ms(
        self, b: Array, s: Array, label_share: Array | float | None = None, times: float = 1.0
    ) -> Array:
        """Return ms for ``b`` sequences of ``s`` tokens (arrays broadcast).

        ``label_share`` of the positions carry a loss; by default as many as were profiled. What
        these add counts so many ``times``.
        """
        b, s = np.asarray(b, dtype=np.float64), np.asarray(s, dtype=np.float64)
        ratio = 1.0 if label_share is None else label_share / self.profiled_share
        time_ms = times * ratio * self.labels.time_ms(b, s)
        return time_ms if self.base is None else time_ms + self.base.time_ms(b, s)


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Measured times of embedding and head: ``rows`` with labels, and ms without, or None."""

    rows: TimeProfile
    base_ms: Array | None = None

    @property
    def profiled_share(self) -> float:
        """The share of positions that carried a loss when ``rows`` were measured."""
        return float(self.rows.meta.get("settings", {}).get("label_share", PROFILED_SHARE))


def load_head_profile(path: str | os.PathLike[str]) -> HeadProfile:
    """Read a CSV with columns ``tp,seq_len,mbs,time`` and, if it has it, ``time_without_labels``.

    Raises
    ------
    ConfigError
        With every mistake of the file, see ``load_time_profile``.
    """
    path = Path(path)
    rows = load_time_profile(path)
    problems: list[str] = []
    base = None
    column = HEAD_COLUMNS[3]
    found, _ = read_rows(path, TIME_COLUMNS, "lobra profile time", (column,))
    if any(row[column] for _, row in found):
        values = [finite_ms(path, line, row[column], problems) for line, row in found]
        problems += [
            f"{path}: line {line}: {column}: {value} ms; a time is positive"
            for (line, _), value in zip(found, values, strict=True)
            if value is not None and value <= 0
        ]
        base = np.array([value or 0.0 for value in values])
    if problems:
        raise ConfigError(problems)
    return HeadProfile(rows, base)


def fit_heads(profile: HeadProfile) -> Mapping[int, HeadFit]:
    """Return the fit of every tensor-parallel size of the profile."""
    fits = {}
    for tp in profile.rows.tps:
        rows = profile.rows.tp == tp
        b = profile.rows.mbs[rows].astype(np.float64)
        s = profile.rows.seq_len[rows].astype(np.float64)
        labels_ms, base = profile.rows.time_ms[rows], None
        if profile.base_ms is not None:
            base = fit_layer(b, s, profile.base_ms[rows], "fitted")
            labels_ms = np.maximum(labels_ms - profile.base_ms[rows], SMALLEST_LOSS_MS)
        labels = fit_layer(b, s, labels_ms, "fitted")
        fits[tp] = HeadFit(base, labels, profile.profiled_share)
    return fits
