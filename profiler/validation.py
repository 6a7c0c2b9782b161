"""How well a cost model predicts rows it has not seen, and which rows of a profile look wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lobra.common.errors import ConfigError
from lobra.profiler.layer_fit import Kind, fit_layer
from lobra.profiler.profiles import TimeProfile
from lobra.profiler.sweep_rows import policy_of

Array = np.ndarray

SUSPICIOUS_DEVIATIONS = 5.0
SUSPICIOUS_ERROR = 0.05  # less is of no consequence for a plan
EDGE_SIZES = 2  # that must be seen on either side of a row, its own included, to predict a slope
# A fit may err on held-out rows by this multiple of the rows' own spread, and by this in any case.
EXCUSED_SPREADS = 3.0
EXCUSED_ERROR = 0.05


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
    edge
        bool [n]: whether that fit saw fewer than two sizes (in tokens) on a side of the row, and
        so had to extrapolate.
    """

    tp: int
    kind: Kind
    rows: Array
    error: Array
    edge: Array

    @property
    def mean_error(self) -> float:
        """The mean of the absolute relative errors."""
        return float(np.abs(self.error).mean())

    @property
    def median_error(self) -> float:
        """The median of the absolute relative errors."""
        return float(np.median(np.abs(self.error)))

    @property
    def max_error(self) -> float:
        """The largest absolute relative error."""
        return float(np.abs(self.error).max())


@dataclass(frozen=True)
class SuspiciousRow:
    """A row that its neighbours contradict: ``reason`` says how."""

    tp: int
    b: int
    s: int
    time_ms: float
    error: float
    reason: str


def fold_of_row(profile: TimeProfile, num_folds: int, seed: int = 0) -> Array:
    """Return int64 [rows]: each row's fold, the sizes of a tp's folds differing by at most one.

    Rows that repeat a shape (tp, b, s) go to the same fold, so that no held-out shape was seen.
    """
    folds = np.zeros(len(profile), dtype=np.int64)
    generator = np.random.default_rng(seed)
    for tp in profile.tps:
        rows = np.flatnonzero(profile.tp == tp)
        shapes = np.stack([profile.seq_len[rows], profile.mbs[rows]], axis=1)
        unique, inverse = np.unique(shapes, axis=0, return_inverse=True)
        order = generator.permutation(len(unique)) % num_folds
        folds[rows] = order[inverse.reshape(-1)]
    return folds


def fold_of_length(profile: TimeProfile) -> Array:
    """Return int64 [rows]: a fold for every sequence length, so that a length is unseen whole."""
    folds: Array = np.unique(profile.seq_len, return_inverse=True)[1].reshape(-1)
    return folds


def cross_validate(
    profile: TimeProfile,
    kind: Kind,
    num_folds: int = 5,
    seed: int = 0,
    by_length: bool = False,
) -> tuple[Validation, ...]:
    """Return, for every tp, the error on each row of a cost model fitted without its fold.

    ``by_length`` leaves out whole lengths, one after the other, instead of random rows.

    Raises
    ------
    ConfigError
        If there are fewer than two folds, or a tp has fewer points than folds or too few rows
        for the fit.
    """
    if num_folds < 2:
        raise ConfigError(f"--folds {num_folds}: at least 2 are needed")
    folds = fold_of_length(profile) if by_length else fold_of_row(profile, num_folds, seed)
    results, problems = [], []
    for tp in profile.tps:
        rows = np.flatnonzero(profile.tp == tp)
        found = len(set(folds[rows]))
        if found < (2 if by_length else num_folds):
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
    b, s, time_ms = _rows_of(profile, rows)
    error, edge = np.empty(len(rows)), np.empty(len(rows), dtype=bool)
    for fold in np.unique(folds):
        out = folds == fold
        fit = fit_layer(b[~out], s[~out], time_ms[~out], kind)
        error[out] = fit.time_ms(b[out], s[out]) / time_ms[out] - 1.0
        sizes, tokens = np.unique((b * s)[~out]), (b * s)[out]
        smaller = np.searchsorted(sizes, tokens, side="right")
        larger = len(sizes) - np.searchsorted(sizes, tokens)
        edge[out] = np.minimum(smaller, larger) < EDGE_SIZES
    return Validation(tp, kind, rows, error, edge)


def _rows_of(profile: TimeProfile, rows: Array) -> tuple[Array, Array, Array]:
    b, s = profile.mbs[rows].astype(np.float64), profile.seq_len[rows].astype(np.float64)
    return b, s, profile.time_ms[rows]


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


def suspicious_rows(
    profile: TimeProfile, validations: Iterable[Validation]
) -> tuple[SuspiciousRow, ...]:
    """Return the rows that stick out by far more than the others of their tp, worst first.

    Two ways: the fit that has not seen a row misses it by five robust standard deviations (and at
    least 5 %), or a larger micro-batch takes 5 % less time. At the edge of the
    measured sizes, where the former is an extrapolation, the fit that has seen the row must miss
    it by 5 % too.
    """
    found = []
    for validation in validations:
        b, s, time_ms = _rows_of(profile, validation.rows)
        deviation = 1.4826 * float(np.median(np.abs(validation.error)))
        limit = max(SUSPICIOUS_ERROR, SUSPICIOUS_DEVIATIONS * deviation)
        sticks_out = np.abs(validation.error) > limit
        if np.any(sticks_out & validation.edge):
            seen = np.abs(_error_of_seen(profile, validation)) > SUSPICIOUS_ERROR
            sticks_out &= seen | ~validation.edge
        for row, (error, out) in enumerate(zip(validation.error, sticks_out, strict=True)):
            least_ms = time_ms[(b >= b[row]) & (s >= s[row])].min()
            measured = float(time_ms[row])
            if least_ms < measured * (1.0 - SUSPICIOUS_ERROR):
                reason = f"a larger micro-batch takes {least_ms:.3f} ms"
            elif out:
                reason = f"its neighbours predict {measured * (1.0 + error):.3f} ms"
            else:
                continue
            shape = int(validation.tp), int(b[row]), int(s[row])
            found.append(SuspiciousRow(*shape, measured, float(error), reason))
    return tuple(sorted(found, key=lambda row: -abs(row.error)))


def _error_of_seen(profile: TimeProfile, validation: Validation) -> Array:
    """Return predicted / measured - 1 of each row, by the fit to all of them."""
    b, s, time_ms = _rows_of(profile, validation.rows)
    fit = fit_layer(b, s, time_ms, validation.kind)
    return np.asarray(fit.time_ms(b, s) / time_ms - 1.0)


def row_spread(profile: TimeProfile, tp: int) -> float:
    """Return the median relative spread of a tp's repeats, from the sidecar; 0 if not recorded."""
    rows = profile.meta.get("rows", {})
    spreads = [
        float(details["spread"])
        for name, details in rows.items()
        if name.partition(",")[0] == str(tp)
        and policy_of(name) == profile.memory
        and "spread" in details
    ]
    return float(np.median(spreads)) if spreads else 0.0


def refusals(profile: TimeProfile, validations: Iterable[Validation]) -> list[str]:
    """Return, for every tp whose fit cannot be trusted, why.

    A fit is refused when its median error on held-out rows is more than three times the spread of
    the rows' own repeats, and more than 5 %.
    """
    problems = []
    for validation in validations:
        spread = row_spread(profile, validation.tp)
        excused = max(EXCUSED_ERROR, EXCUSED_SPREADS * spread)
        if validation.median_error > excused:
            problems.append(
                f"{profile.path}: tp {validation.tp}: half of the held-out rows are missed by "
                f"{100 * validation.median_error:.1f} % or more; their own spread of "
                f"{100 * spread:.1f} % excuses {100 * excused:.1f} %. Remove the lines of the "
                f"suspicious rows and run lobra profile time again on a quiet machine: it measures "
                f"them anew"
            )
    return problems


def least_possible_error(profile: TimeProfile, tp: int) -> float:
    """Return the largest relative error that every monotone cost model makes on its own rows.

    A row of time t whose larger neighbour takes only u < t: one of both is missed by at least
    (t - u) / (t + u). Of rows that were held out it says nothing: each fold has a function of its
    own.
    """
    b, s, time_ms = _rows_of(profile, np.flatnonzero(profile.tp == tp))
    larger = (b[:, None] <= b) & (s[:, None] <= s)
    error = np.where(larger, (time_ms[:, None] - time_ms) / (time_ms[:, None] + time_ms), 0.0)
    return float(error.max())
