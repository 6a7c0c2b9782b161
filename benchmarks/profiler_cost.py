"""How few rows suffice: fits to a part of a published profile, judged on all other rows.

    python benchmarks/profiler_cost.py PROFILE.csv

For each number of rows per tp, rows evenly spread over the tokens of a micro-batch are fitted, and
all the others predicted; beside it LobRA's six coefficients fitted to those same rows. Last, what
the rows cost: their number and their own time, repeated equally often, as shares of the profile.
"""

from __future__ import annotations

import argparse

import numpy as np

from lobra.profiler.layer_fit import fit_layer
from lobra.profiler.profiles import TimeProfile, load_time_profile
from lobra.profiler.series import other_series

COUNTS = (10, 15, 20, 30)


def spread_rows(profile: TimeProfile, tp: int, count: int) -> np.ndarray:
    """Return rows of ``tp`` spread evenly in log tokens, b = 1 and full micro-batches by turns."""
    rows = np.flatnonzero(profile.tp == tp)
    others = other_series(profile)
    if others is not None:
        rows = rows[~others[rows]]
    tokens = profile.mbs[rows] * profile.seq_len[rows]
    chosen: list[int] = []
    targets = np.exp(np.linspace(np.log(tokens.min()), np.log(tokens.max()), count))
    for turn, target in enumerate(targets):
        distance = np.abs(np.log(tokens / target))
        preference = 0.05 * np.log(profile.mbs[rows]) * (1 if turn % 2 else -1)
        for row in rows[np.argsort(distance + preference)]:
            if row not in chosen:
                chosen.append(int(row))
                break
    return np.array(chosen)


def errors(profile: TimeProfile, tp: int, fitted: np.ndarray, kind: str) -> np.ndarray:
    """Return absolute relative errors on the rows of the reference series not fitted."""
    b, s = profile.mbs.astype(float), profile.seq_len.astype(float)
    fit = fit_layer(b[fitted], s[fitted], profile.time_ms[fitted], kind)
    rest = np.setdiff1d(np.flatnonzero(profile.tp == tp), fitted)
    others = other_series(profile)
    if others is not None:
        rest = rest[~others[rest]]
    return np.abs(fit.time_ms(b[rest], s[rest]) / profile.time_ms[rest] - 1.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile")
    profile = load_time_profile(parser.parse_args().profile)
    chosen: dict[int, list[np.ndarray]] = {count: [] for count in COUNTS}
    print("tp rows  fitted mean  lobra6 mean (same rows)")
    for tp in profile.tps:
        for count in COUNTS:
            rows = spread_rows(profile, tp, count)
            chosen[count].append(rows)
            left = errors(profile, tp, rows, "fitted")
            if len(left) < 4:
                continue
            theirs = errors(profile, tp, rows, "lobra6")
            means = f"{100 * left.mean():10.2f} % {100 * theirs.mean():10.2f} %"
            print(f"{tp:2} {len(rows):4} {means}   ({len(left)} rows judged)")
    for count, parts in chosen.items():
        rows = np.concatenate(parts)
        time_share = profile.time_ms[rows].sum() / profile.time_ms.sum()
        print(
            f"{count} rows per tp: {len(rows)} of {len(profile)} rows "
            f"({100 * len(rows) / len(profile):.0f} %), {100 * time_share:.0f} % of the time"
        )


if __name__ == "__main__":
    main()
