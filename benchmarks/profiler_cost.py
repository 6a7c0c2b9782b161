"""How few rows suffice: fits to a part of a published profile, judged on all other rows.

For each number of rows per tp, rows evenly spread over the tokens of a micro-batch are fitted, and
all the others predicted; beside it LobRA's six coefficients fitted to those same rows. Last, what
the rows cost: their number and their own time, repeated equally often, as shares of the profile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lobra.profiler.cost_model import Kind
from lobra.profiler.layer_fit import fit_layer
from lobra.profiler.profiles import TimeProfile, load_time_profile

COUNTS = (10, 15, 20, 30)
FEWEST_JUDGED = 4


def spread_rows(profile: TimeProfile, tp: int, count: int) -> np.ndarray:
    """Return rows of ``tp`` spread evenly in log tokens, b = 1 and full micro-batches by turns."""
    rows = np.flatnonzero(profile.tp == tp)
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


def errors(profile: TimeProfile, tp: int, fitted: np.ndarray, kind: Kind) -> np.ndarray:
    """Return absolute relative errors on the rows of ``tp`` that were not fitted."""
    b, s = profile.mbs.astype(float), profile.seq_len.astype(float)
    fit = fit_layer(b[fitted], s[fitted], profile.time_ms[fitted], kind)
    rest = np.setdiff1d(np.flatnonzero(profile.tp == tp), fitted)
    return np.abs(fit.time_ms(b[rest], s[rest]) / profile.time_ms[rest] - 1.0)


def profiler_cost(profile: Path) -> Iterator[dict[str, Any]]:
    """Fit parts of a time profile and judge them on all other rows.

    Parameters
    ----------
    profile
        The CSV, with more rows of each tp than are fitted.
    """
    table = load_time_profile(profile)
    chosen: dict[int, list[np.ndarray]] = {count: [] for count in COUNTS}
    for tp in table.tps:
        for count in COUNTS:
            rows = spread_rows(table, tp, count)
            chosen[count].append(rows)
            ours, theirs = (errors(table, tp, rows, kind) for kind in ("fitted", "lobra6"))
            if len(ours) >= FEWEST_JUDGED:
                yield {
                    "tp": tp,
                    "rows": len(rows),
                    "rows judged": len(ours),
                    "mean error, %": 100 * float(ours.mean()),
                    "LobRA's form, %": 100 * float(theirs.mean()),
                }
    for count, parts in chosen.items():
        rows = np.concatenate(parts)
        yield {
            "rows per tp": count,
            "of all rows, %": 100 * len(rows) / len(table),
            "of all time, %": 100 * float(table.time_ms[rows].sum() / table.time_ms.sum()),
        }
