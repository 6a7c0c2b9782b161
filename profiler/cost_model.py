"""The cost model: milliseconds for one layer, forward + backward, fitted to a time profile."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.optimize import nnls

from profiler.profiles import (
    TimeProfile,
    default_head_path,
    default_time_path,
    load_time_profile,
    num_layers_of,
)
from tasks.errors import ConfigError

Kind = Literal["fitted", "lobra6"]
KINDS: tuple[Kind, ...] = ("fitted", "lobra6")

MAX_KNOTS = 5
POINTS_PER_KNOT = 5
# The published fit can go below zero far from its data; a time is never less than this.
SMALLEST_TIME_MS = 1e-3


@dataclass(frozen=True, eq=False)
class LayerFit:
    """One tensor-parallel size's fitted time of a layer.

    Attributes
    ----------
    kind
        ``lobra6``: ``(c1 b + c2) s^2 + (c3 b + c4) s + (c5 b + c6)`` (LobRA, section 4.2);
        ``fitted``: a non-negative sum of terms that never decrease in b or s.
    coefficients
        float64 [terms], in ms.
    knots
        float64 [k], tokens per micro-batch: where the ``fitted`` slope may change.
    mean_error, max_error
        Relative errors on the rows it was fitted to.
    """

    kind: Kind
    coefficients: np.ndarray
    knots: np.ndarray
    mean_error: float = 0.0
    max_error: float = 0.0

    def time_ms(self, b: np.ndarray, s: np.ndarray) -> np.ndarray:
        """Return ms for micro-batches of ``b`` sequences of ``s`` tokens (arrays broadcast)."""
        b, s = np.asarray(b, dtype=np.float64), np.asarray(s, dtype=np.float64)
        if self.kind == "lobra6":
            c1, c2, c3, c4, c5, c6 = self.coefficients
            time_ms = (c1 * b + c2) * s * s + (c3 * b + c4) * s + (c5 * b + c6)
            return np.maximum(time_ms, SMALLEST_TIME_MS)
        constant, per_sequence, per_position, per_token, quadratic = self.coefficients[:5]
        tokens = b * s
        time_ms = constant + per_sequence * b + per_position * s
        time_ms = time_ms + tokens * (per_token + quadratic * s)
        beyond = self.coefficients[5 : 5 + len(self.knots)]
        within = self.coefficients[5 + len(self.knots) :]
        for knot, slope_beyond, slope_within in zip(self.knots, beyond, within, strict=True):
            if slope_beyond:
                time_ms = time_ms + slope_beyond * np.maximum(0.0, tokens - knot)
            if slope_within:
                time_ms = time_ms + slope_within * np.minimum(tokens, knot)
        return np.maximum(time_ms, SMALLEST_TIME_MS)


@dataclass(frozen=True, eq=False)
class CostModel:
    """Times of layers and micro-batches ("chunks") for every profiled tensor-parallel size.

    Attributes
    ----------
    num_layers
        Transformer layers of the model.
    kind
        Which fit, see ``LayerFit``.
    layers
        The fit of one layer, by tp.
    head
        The fit of embedding and head together, by tp; empty when not profiled.
    meta
        Where the profile comes from.
    """

    num_layers: int
    kind: Kind
    layers: Mapping[int, LayerFit]
    head: Mapping[int, LayerFit] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tps(self) -> tuple[int, ...]:
        """The tensor-parallel sizes there are times for, ascending."""
        return tuple(sorted(self.layers))

    def layer_time_ms(self, tp: int, b: np.ndarray | int, s: np.ndarray | int) -> np.ndarray:
        """Return ms of one layer, forward + backward, for ``b`` sequences padded to ``s`` tokens.

        ``b`` and ``s`` broadcast. Raises ``ConfigError`` if ``tp`` was not profiled.
        """
        return self._fit(tp).time_ms(np.asarray(b), np.asarray(s))

    def chunk_time_ms(
        self, tp: int, pp: int, b: np.ndarray | int, s: np.ndarray | int
    ) -> np.ndarray:
        """Return ms a micro-batch keeps the slowest stage of ``<tp,pp>`` busy.

        Layer time x layers per stage (rounded up where pp does not divide them), plus embedding
        and head where they were profiled. ``b`` and ``s`` broadcast.
        """
        layers = -(-self.num_layers // pp)
        time_ms = self._fit(tp).time_ms(np.asarray(b), np.asarray(s)) * layers
        if tp in self.head:
            time_ms = time_ms + self.head[tp].time_ms(np.asarray(b), np.asarray(s))
        return time_ms

    def _fit(self, tp: int) -> LayerFit:
        if tp not in self.layers:
            raise ConfigError(
                f"time profile {self.meta.get('path', '')}: no rows for tp {tp}; it has "
                f"tp {', '.join(map(str, self.tps))}. Profile it with "
                f"scripts/cost_model_benchmark.sh"
            )
        return self.layers[tp]


def fit_cost_model(
    time_profile: TimeProfile,
    num_layers: int,
    kind: Kind = "fitted",
    head_profile: TimeProfile | None = None,
) -> CostModel:
    """Return the cost model fitted to a profile, each tensor-parallel size for itself.

    Raises
    ------
    ConfigError
        If the kind is unknown, or a tp has too few rows for it (``lobra6`` needs six).
    """
    if kind not in KINDS:
        raise ConfigError(f"cost model {kind!r}: known are {', '.join(KINDS)}")
    meta = {"path": str(time_profile.path or ""), "digest": time_profile.digest}
    head = _fit_all(head_profile, "fitted") if head_profile is not None else {}
    return CostModel(num_layers, kind, _fit_all(time_profile, kind), head, meta)


def _fit_all(profile: TimeProfile, kind: Kind) -> dict[int, LayerFit]:
    fits, problems = {}, []
    for tp in profile.tps:
        rows = profile.tp == tp
        b = profile.mbs[rows].astype(np.float64)
        s = profile.seq_len[rows].astype(np.float64)
        try:
            fits[tp] = fit_layer(b, s, profile.time_ms[rows], kind)
        except ConfigError as error:
            problems.append(f"{profile.path or 'time profile'}: tp {tp}: {error}")
    if problems:
        raise ConfigError(problems)
    return fits


def fit_layer(b: np.ndarray, s: np.ndarray, time_ms: np.ndarray, kind: Kind) -> LayerFit:
    """Fit one tensor-parallel size's rows: ``b``, ``s``, ``time_ms`` are float64 [rows].

    ``lobra6`` is ordinary least squares, as published. ``fitted`` minimises relative errors with
    non-negative coefficients over terms that are monotone in b and s: a constant, b, s, tokens
    (b s), attention (b s^2), and for larger profiles slopes that change with the tokens per
    micro-batch (a device fills up). Between and beyond its rows it therefore never decreases, and
    beyond them it grows at most as b s^2.
    """
    knots = np.empty(0)
    if kind == "lobra6":
        terms = np.stack([b * s * s, s * s, b * s, s, b, np.ones_like(b)], axis=1)
        rank = int(np.linalg.matrix_rank(terms / np.abs(terms).max(axis=0)))
        if rank < 6:
            raise ConfigError(
                f"{len(b)} rows determine {rank} of the six coefficients of the lobra6 fit; "
                f"measure at least 3 lengths x 2 batch sizes, or use the fitted cost model"
            )
        scale = np.abs(terms).max(axis=0)
        coefficients = np.linalg.lstsq(terms / scale, time_ms, rcond=None)[0] / scale
    else:
        knots = _knots(b * s)
        terms = _monotone_terms(b, s, knots)
        if len(b) < 10:  # too few rows to tell the smaller terms apart
            terms[:, 1:3] = 0.0
        scale = np.maximum(np.abs(terms).max(axis=0), 1e-30)
        weighted = terms / scale / time_ms[:, None]
        coefficients = nnls(weighted, np.ones(len(b)), maxiter=100 * terms.shape[1])[0] / scale
    fit = LayerFit(kind, coefficients, knots)
    error = np.abs(fit.time_ms(b, s) / time_ms - 1.0)
    return LayerFit(kind, coefficients, knots, float(error.mean()), float(error.max()))


def _knots(tokens: np.ndarray) -> np.ndarray:
    """Return the tokens at which the slope may change: spread evenly in the logarithm."""
    count = min(MAX_KNOTS, len(tokens) // POINTS_PER_KNOT - 1)
    if count < 1 or tokens.min() == tokens.max():
        return np.empty(0)
    inner = np.linspace(np.log(tokens.min()), np.log(tokens.max()), count + 2)[1:-1]
    return np.exp(inner)


def _monotone_terms(b: np.ndarray, s: np.ndarray, knots: np.ndarray) -> np.ndarray:
    tokens = b * s
    terms = [np.ones_like(b), b, s, tokens, tokens * s]
    terms += [np.maximum(0.0, tokens - knot) for knot in knots]
    terms += [np.minimum(tokens, knot) for knot in knots]
    return np.stack(terms, axis=1)


def load_cost_model(
    model: str,
    time_path: str | os.PathLike[str] | None = None,
    kind: Kind = "fitted",
) -> CostModel:
    """Return the cost model of a model (``tiny``, ``7B``, ... or a folder) from its profiles.

    Without ``time_path`` the profile at the contract's path is read, and that of embedding and
    head beside it if there is one.

    Raises
    ------
    ConfigError
        If the model is unknown, or a profile is missing or has mistakes.
    """
    path = default_time_path(model) if time_path is None else time_path
    head_path = default_head_path(model)
    head = load_time_profile(head_path) if time_path is None and head_path.is_file() else None
    return fit_cost_model(load_time_profile(path), num_layers_of(model), kind, head)
