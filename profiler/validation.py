"""How well a cost model predicts rows it has not seen: k-fold cross-validation over a profile."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from profiler.cost_model import Kind, fit_layer
from profiler.profiles import TimeProfile
from tasks.errors import ConfigError

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class Validation:
    """Errors of one tensor-parallel size on held-out rows.

    Attributes
    ----------
    tp, kind
        What was fitted.
    rows
        int64 [n]: the rows of the profile.
    error
        float64 [n]: predicted / measured - 1 of each row, by the fit that has not seen it.
    """

    tp: int
    kind: Kind
    rows: Array
    error: Array

    @property
    def mean_error(self) -> float:
        """The mean of the absolute relative errors."""
        return float(np.abs(self.error).mean())

    @property
    def max_error(self) -> float:
        """The largest absolute relative error."""
        return float(np.abs(self.error).max())


def fold_of_row(profile: TimeProfile, num_folds: int, seed: int = 0) -> Array:
    """Return int64 [rows]: each row's fold, the sizes of a tp's folds differing by at most one.

    Rows that repeat a point (tp, b, s) go to the same fold, so that no held-out point was seen.
    """
    folds = np.zeros(len(profile), dtype=np.int64)
    generator = np.random.default_rng(seed)
    for tp in profile.tps:
        rows = np.flatnonzero(profile.tp == tp)
        points = np.stack([profile.seq_len[rows], profile.mbs[rows]], axis=1)
        unique, inverse = np.unique(points, axis=0, return_inverse=True)
        order = generator.permutation(len(unique)) % num_folds
        folds[rows] = order[inverse.reshape(-1)]
    return folds


def cross_validate(
    profile: TimeProfile, kind: Kind, num_folds: int = 5, seed: int = 0
) -> tuple[Validation, ...]:
    """Return, for every tp, the error on each row of a cost model fitted without its fold.

    Raises
    ------
    ConfigError
        If there are fewer than two folds, or a tp has fewer points than folds or too few rows
        for the fit.
    """
    if num_folds < 2:
        raise ConfigError(f"--folds {num_folds}: at least 2 are needed")
    folds = fold_of_row(profile, num_folds, seed)
    results, problems = [], []
    for tp in profile.tps:
        rows = np.flatnonzero(profile.tp == tp)
        if len(set(folds[rows])) < num_folds:
            problems.append(
                f"{profile.path}: tp {tp}: fewer points than {num_folds} folds; measure more or "
                f"pass a smaller --folds"
            )
            continue
        try:
            results.append(_validate_tp(profile, tp, kind, rows, folds[rows]))
        except ConfigError as error:
            problems.append(f"{profile.path}: tp {tp}: {error}")
    if problems:
        raise ConfigError(problems)
    return tuple(results)


def _validate_tp(
    profile: TimeProfile, tp: int, kind: Kind, rows: Array, folds: Array
) -> Validation:
    b, s = profile.mbs[rows].astype(np.float64), profile.seq_len[rows].astype(np.float64)
    time_ms = profile.time_ms[rows]
    error = np.empty(len(rows))
    for fold in np.unique(folds):
        held_out = folds == fold
        fit = fit_layer(b[~held_out], s[~held_out], time_ms[~held_out], kind)
        error[held_out] = fit.time_ms(b[held_out], s[held_out]) / time_ms[held_out] - 1.0
    return Validation(tp, kind, rows, error)


def worst_rows(
    profile: TimeProfile, validations: Iterable[Validation], count: int
) -> list[tuple[int, int, int, float, float]]:
    """Return (tp, b, s, time in ms, error) of the rows predicted worst, worst first."""
    table = [
        (
            int(profile.tp[row]),
            int(profile.mbs[row]),
            int(profile.seq_len[row]),
            float(profile.time_ms[row]),
            float(error),
        )
        for validation in validations
        for row, error in zip(validation.rows, validation.error, strict=True)
    ]
    return sorted(table, key=lambda entry: -abs(entry[4]))[:count]
