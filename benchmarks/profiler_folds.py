"""Cross-validation of the cost models over many divisions into folds, and what bounds its errors.

    python benchmarks/profiler_folds.py PROFILE.csv [--seeds 20]

Per kind and tp: the mean error (average, deviation and range over the seeds) and the largest; with
and without the rows that the fit which has not seen them names suspicious. Last, the largest error
that a cost model which never decreases in b or s must make on rows it has seen, by linear
programming: of one function for all rows, of one with a constant offset for the other series, of
one for each series, and of the latter if of equally many tokens longer sequences never take less.

With `--timers`, only which timer measured each row of a power-of-two length, as its digits tell: a
sum of repeats that is a multiple of 1,024 ns is a GPU event timer's (e), another is not (h); a dash
where float32's rounding of the repeats hides it; capital E: repeats averaged by three.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import linprog

from lobra.profiler.layer_fit import KINDS, Kind
from lobra.profiler.profiles import TimeProfile, load_time_profile
from lobra.profiler.series import other_series
from lobra.profiler.validation import cross_validate, suspicious_rows

BAR_MEAN, BAR_MAX = 2.0, 6.0
TICK_NS = 1024  # of a GPU event timer


def seeds_table(profile: TimeProfile, kind: Kind, num_seeds: int) -> None:
    """Print the errors over the seeds, in percent."""
    means, largest, kept_means, kept_largest = [], [], [], []
    for seed in range(num_seeds):
        validations = cross_validate(profile, kind, seed=seed)
        named = {(row.tp, row.b, row.s) for row in suspicious_rows(profile, validations)}
        errors = [100 * np.abs(v.error) for v in validations]
        keep = [
            np.array(
                [(v.tp, int(profile.mbs[r]), int(profile.seq_len[r])) not in named for r in v.rows]
            )
            for v in validations
        ]
        means.append([e.mean() for e in errors])
        largest.append([e.max() for e in errors])
        kept_means.append([e[k].mean() for e, k in zip(errors, keep, strict=True)])
        kept_largest.append([e[k].max() for e, k in zip(errors, keep, strict=True)])
    mean, worst = np.array(means), np.array(largest)
    kept_mean, kept_worst = np.array(kept_means), np.array(kept_largest)
    for column, tp in enumerate(profile.tps):
        m, w = mean[:, column], worst[:, column]
        print(
            f"{kind:7} tp {tp}: mean {m.mean():.2f} +- {m.std():.2f} ({m.min():.2f} to "
            f"{m.max():.2f}), below {BAR_MEAN:g} in {(m < BAR_MEAN).sum()} of {num_seeds}; max "
            f"{w.mean():.1f} ({w.min():.1f} to {w.max():.1f}), below {BAR_MAX:g} in "
            f"{(w < BAR_MAX).sum()}; without suspicious rows {kept_mean[:, column].mean():.2f}, "
            f"max {kept_worst[:, column].mean():.1f}"
        )


def floor(
    profile: TimeProfile,
    tp: int,
    split: bool = False,
    offset: bool = False,
    by_tokens: bool = False,
) -> float:
    """Return the least possible largest relative error of a function that never decreases.

    ``split``: a function for each series; ``offset``: one, plus a constant for the other series;
    ``by_tokens``: nor does it decrease with the length of the sequences at equally many tokens.
    """
    rows = np.flatnonzero(profile.tp == tp)
    b, s, time_ms = profile.mbs[rows], profile.seq_len[rows], profile.time_ms[rows]
    found = other_series(profile)
    other = np.zeros(len(rows), dtype=bool) if found is None else found[rows]
    count = len(rows)
    table, limit = [], []  # variables: the function at each row, the error, the offset
    for row in range(count):
        line = np.zeros(count + 2)
        line[row] = 1 / time_ms[row]
        line[count + 1] = -1 / time_ms[row] if offset and other[row] else 0.0
        for sign in (1, -1):
            bound = sign * line
            bound[count] = -1
            table.append(bound)
            limit.append(sign)
    larger = (b[:, None] <= b) & (s[:, None] <= s)
    if by_tokens:
        larger |= (s[:, None] <= s) & ((b * s)[:, None] <= b * s)
    if split:
        larger &= other[:, None] == other
    np.fill_diagonal(larger, False)
    for first, second in zip(*np.nonzero(larger), strict=True):
        line = np.zeros(count + 2)
        line[first], line[second] = 1, -1
        table.append(line)
        limit.append(0)
    cost = np.zeros(count + 2)
    cost[count] = 1
    bounds = [(0, None)] * (count + 1) + [(0, None) if offset else (0, 0)]
    return float(linprog(cost, A_ub=np.array(table), b_ub=limit, bounds=bounds).fun)


def timer_of(time_ms: float) -> str:
    """Return which timer measured an average of 100 repeats, or of three times ten: e, E, h, -."""
    total_ns = time_ms * 1e8
    by_three = abs(total_ns - round(total_ns)) > 1e-3 + total_ns * 4e-15
    repeats = 30 if by_three else 100
    off_ns = abs(time_ms * 1e6 * repeats % TICK_NS)
    off_ns = min(off_ns, TICK_NS - off_ns)
    # Each repeat is a float32 of milliseconds: off by half its last place at most.
    rounding_ns = repeats * float(np.spacing(np.float32(time_ms))) * 1e6 / 2 + 2
    if by_three:
        return "E"
    if off_ns > rounding_ns:
        return "h"
    return "e" if rounding_ns < TICK_NS / 10 else "-"


def timers_table(profile: TimeProfile) -> None:
    """Print the timer of every row whose length is 256, 512, 1024, ..."""
    others = other_series(profile)
    for tp in profile.tps:
        rows = profile.tp == tp
        if others is not None:
            rows &= ~others
        for s in np.unique(profile.seq_len[rows]):
            found = np.flatnonzero(rows & (profile.seq_len == s))
            timers = ", ".join(f"b {profile.mbs[r]} {timer_of(profile.time_ms[r])}" for r in found)
            print(f"tp {tp}, length {s:5}: {timers}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--timers", action="store_true")
    args = parser.parse_args()
    profile = load_time_profile(args.profile)
    if args.timers:
        timers_table(profile)
        return
    for kind in KINDS:
        seeds_table(profile, kind, args.seeds)
    for tp in profile.tps:
        shares = (
            floor(profile, tp),
            floor(profile, tp, offset=True),
            floor(profile, tp, split=True),
            floor(profile, tp, split=True, by_tokens=True),
        )
        one, shifted, two, longer = (100 * share for share in shares)
        print(
            f"tp {tp}: at least {one:.1f} % of one function, {shifted:.1f} % with an offset, "
            f"{two:.1f} % of one a series, {longer:.1f} % if longer is never faster"
        )


if __name__ == "__main__":
    main()
