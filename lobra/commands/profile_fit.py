"""`lobra profile fit`: the cost model's error on held-out rows, a plot, rows that look wrong."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lobra.commands.profile_options import at_least, make_console
from lobra.common.errors import ConfigError
from lobra.layout.shapes import TINY
from lobra.profiler.layer_fit import KINDS, Kind
from lobra.profiler.profiles import TimeProfile, default_time_path, load_time_profile
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fit`."""
    parser.add_argument("--model", default=TINY, help="whose profile (default tiny)")
    parser.add_argument("--time-profile", type=Path, help="the CSV (default: the model's)")
    parser.add_argument(
        "--memory", choices=("keep", "full"), default="keep", help="whose rows (default keep)"
    )
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: every kind")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--worst", type=int, default=5, help="rows predicted worst to list")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="where to save the plot")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print errors on held-out rows; return 1 if the fit (`fitted`) cannot be trusted."""
    at_least("--worst", args.worst, 0)
    profile = load_time_profile(args.time_profile or default_time_path(args.model), args.memory)
    kinds: tuple[Kind, ...] = tuple(dict.fromkeys(args.kind or KINDS))
    rows: Found = {}
    lengths: Found = {}
    by_length = min(len(set(profile.seq_len[profile.tp == tp])) for tp in profile.tps) > 2
    for kind in kinds:
        try:
            held_out = cross_validate(profile, kind, args.folds, args.seed)
            unseen = cross_validate(profile, kind, by_length=True) if by_length else ()
        except ConfigError as error:
            if args.kind or not rows:
                raise
            make_console().print(f"{kind}: left out of the comparison: {error.problems[0]}")
            continue
        rows[kind] = held_out
        if unseen:
            lengths[kind] = unseen
    judged = rows[kinds[0]]
    suspicious = suspicious_rows(profile, judged)
    refused = refusals(profile, judged)
    if args.plot is not None:
        from lobra.profiler.plot import plot_fit

        plot_fit(profile, judged, suspicious, args.plot)
    if args.json:
        print(json.dumps(_as_json(args, profile, rows, lengths, suspicious, refused)))
    else:
        _print_tables(args, profile, rows, lengths, suspicious)
    for problem in refused:
        make_console().print(f"refused: {problem}")
    return REFUSED if refused else 0


def _as_json(
    args: argparse.Namespace,
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
        "folds": args.folds,
        "error": errors(rows),
        "error_by_length": errors(lengths),
        "suspicious": [vars(row) for row in suspicious],
        "refused": refused,
    }


def _print_tables(
    args: argparse.Namespace,
    profile: TimeProfile,
    rows: Found,
    lengths: Found,
    suspicious: tuple[SuspiciousRow, ...],
) -> None:
    from rich.table import Table

    console = make_console(error_stream=False)
    table = Table(title=f"{profile.path}: error on held-out rows")
    columns = ("cost model", "tp", "rows", f"mean ({args.folds} folds)", "max", "length unseen")
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
    for tp, b, s, time_ms, error in worst_rows(profile, rows[kind], args.worst):
        console.print(f"tp {tp}, {b} x {s}: {time_ms:.3f} ms, predicted {100 * error:+.1f} %")
    for row in suspicious:
        console.print(
            f"suspicious: tp {row.tp}, {row.b} x {row.s}: {row.time_ms:.3f} ms, but {row.reason}"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
