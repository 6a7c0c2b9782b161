"""`lobra profile fit`: the cost model's error on held-out rows, a plot, rows that look wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from lobra.commands.profile_options import make_console
from lobra.common.errors import ConfigError
from lobra.common.options import Int, Json, NonNegativeInt, as_options, option_problems
from lobra.layout.shapes import TINY
from lobra.profiler.layer_fit import KINDS, Kind
from lobra.profiler.lookup import time_path
from lobra.profiler.profiles import TimeProfile, load_time_profile
from lobra.profiler.validation import (
    SuspiciousRow,
    Validation,
    cross_validate,
    least_possible_error,
    refusals,
    row_spread,
    suspicious_rows,
    worst_rows,
)

REFUSED = 1

Found = dict[Kind, tuple[Validation, ...]]


@as_options
@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Which fits of which profile are judged, and how.

    Parameters
    ----------
    model
        Whose profile.
    time_profile
        The CSV; by default the model's.
    memory
        Rows of which memory policy.
    kind
        A kind of cost model (repeatable); by default every kind.
    folds
        Of the cross-validation.
    seed
        Of the folds.
    worst
        Rows predicted worst to list.
    plot
        Where to save the plot.
    """

    model: str = TINY
    time_profile: Path | None = None
    memory: Literal["keep", "full"] = "keep"
    kind: tuple[Kind, ...] = ()
    folds: Int = 5
    seed: NonNegativeInt = 0
    worst: NonNegativeInt = 5
    plot: Annotated[Path | None, Parameter(metavar="PNG")] = None
    json: Json = False


DEFAULTS = FitOptions()


def profile_fit(*, options: FitOptions = DEFAULTS) -> int:
    """Say how far the cost model can be trusted.

    Its errors on rows and on whole lengths it has not seen, which rows look wrong, and LobRA's six
    coefficients beside it. Ends 1 if the fit is refused.

    Raises
    ------
    ConfigError
        If an option is out of bounds, or the profile cannot be used.
    """
    option_problems(options).raise_if_any()
    profile = load_time_profile(options.time_profile or time_path(options.model), options.memory)
    kinds: tuple[Kind, ...] = tuple(dict.fromkeys(options.kind or KINDS))
    rows: Found = {}
    lengths: Found = {}
    by_length = min(len(set(profile.seq_len[profile.tp == tp])) for tp in profile.tps) > 2
    for kind in kinds:
        try:
            held_out = cross_validate(profile, kind, options.folds, options.seed)
            unseen = cross_validate(profile, kind, by_length=True) if by_length else ()
        except ConfigError as error:
            if options.kind or not rows:
                raise
            make_console().print(f"{kind}: left out of the comparison: {error.problems[0]}")
            continue
        rows[kind] = held_out
        if unseen:
            lengths[kind] = unseen
    judged = rows[kinds[0]]
    suspicious = suspicious_rows(profile, judged)
    refused = refusals(profile, judged)
    if options.plot is not None:
        from lobra.report.fit_plot import plot_fit

        plot_fit(profile, judged, suspicious, options.plot)
    if options.json:
        print(json.dumps(_as_json(options, profile, rows, lengths, suspicious, refused)))
    else:
        _print_tables(options, profile, rows, lengths, suspicious)
    for problem in refused:
        make_console().print(f"refused: {problem}")
    return REFUSED if refused else 0


def _as_json(
    options: FitOptions,
    profile: TimeProfile,
    rows: Found,
    lengths: Found,
    suspicious: tuple[SuspiciousRow, ...],
    refused: list[str],
) -> dict[str, Any]:
    def errors(found: Found) -> dict[str, Any]:
        return {
            kind: {
                str(v.tp): {
                    "rows": len(v.rows),
                    "mean": v.mean_error,
                    "median": v.median_error,
                    "max": v.max_error,
                }
                for v in validations
            }
            for kind, validations in found.items()
        }

    return {
        "profile": str(profile.path),
        "folds": options.folds,
        "error": errors(rows),
        "error_by_length": errors(lengths),
        "suspicious": [vars(row) for row in suspicious],
        "refused": refused,
    }


def _print_tables(
    options: FitOptions,
    profile: TimeProfile,
    rows: Found,
    lengths: Found,
    suspicious: tuple[SuspiciousRow, ...],
) -> None:
    from rich.table import Table

    console = make_console(error_stream=False)
    table = Table(title=f"{profile.path}: error on held-out rows")
    columns = ("cost model", "tp", "rows", f"mean ({options.folds} folds)", "max", "length unseen")
    for column in (*columns, "spread", "floor"):
        table.add_column(column, justify="left" if column == "cost model" else "right")
    for kind, validations in rows.items():
        unseen = {v.tp: v for v in lengths.get(kind, ())}
        for v in validations:
            table.add_row(
                kind,
                str(v.tp),
                str(len(v.rows)),
                _percent(v.mean_error),
                _percent(v.max_error),
                _percent(unseen[v.tp].mean_error) if v.tp in unseen else "",
                _percent(row_spread(profile, v.tp)) if "rows" in profile.meta else "",
                _percent(least_possible_error(profile, v.tp)),
            )
    console.print(table)
    console.print(
        "spread: of a row's own repeats. floor: what any cost model that never decreases in b or s "
        "misses one of these rows by, even of those it has seen."
    )
    kind = next(iter(rows))
    for tp, b, s, time_ms, error in worst_rows(profile, rows[kind], options.worst):
        console.print(f"tp {tp}, {b} x {s}: {time_ms:.3f} ms, predicted {100 * error:+.1f} %")
    for row in suspicious:
        console.print(
            f"suspicious: tp {row.tp}, {row.b} x {row.s}: {row.time_ms:.3f} ms, but {row.reason}"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
