"""Fill the tables of docs/reproduction.md from the experiments' CSVs.

    python -m experiments.reproduction [--collect exp_result] [--results FOLDER] [--page FILE]

A table stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what is between them is
replaced. ``--collect`` first copies the tables of ``exp_result/expr_*`` into the results folder.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from experiments.published import REDUCTION, SETUPS
from experiments.study import FUSED, LOBRA, OURS, OURS_POWERS, SEQUENTIAL
from tasks.errors import ConfigError
from tasks.files import write_atomic

RESULTS = Path("docs/results/2026-11-21-experiments")
PAGE = Path("docs/reproduction.md")
LEFT_OUT = ("timeline", "steps")  # long; 7B's steps are kept, the others can be made again
Row = Mapping[str, str]
Tables = Mapping[str, Mapping[str, Sequence[Row]]]  # experiment -> table -> rows


def read_results(folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return the tables of every experiment of a results folder.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for path in sorted(folder.glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found.setdefault(path.parent.name, {})[path.stem] = list(csv.DictReader(file))
    if not found:
        raise ConfigError(f"{folder}: no tables of experiments")
    return found


def collect(source: Path, target: Path) -> None:
    """Copy the tables of ``source/expr_*`` and what they were made from into ``target``."""
    for folder in sorted(source.glob("expr_*")):
        if not (folder / "provenance.json").is_file():
            continue
        for path in [*sorted(folder.glob("*.csv")), folder / "provenance.json"]:
            if path.stem not in LEFT_OUT or (path.stem, folder.name) == ("steps", "expr_7b"):
                write_atomic(target / folder.name / path.name, path.read_bytes())


def fill(page: str, tables: Tables) -> str:
    """Return the page with every table made anew.

    Raises
    ------
    ConfigError
        If the page asks for a table there is not.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ConfigError(f"table {name}: unknown; known are {', '.join(TABLES)}")
        body = "\n".join(TABLES[name](tables))
        return f"<!-- begin {name} -->\n{body}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", replaced, page, flags=re.DOTALL)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _models(tables: Tables) -> list[tuple[str, Mapping[str, Sequence[Row]]]]:
    return [(m, tables[f"expr_{m.lower()}"]) for m in SETUPS if f"expr_{m.lower()}" in tables]


def _percent(row: Row, column: str) -> str:
    mean, low, high = (100 * float(row[f"{column}{end}"]) for end in ("", "_low", "_high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _reduction(tables: Tables) -> list[str]:
    published = f"{100 * REDUCTION[0]:.2f} to {100 * REDUCTION[1]:.2f} %"
    rows = []
    for label, name in (
        ("7B", "expr_7b"),
        ("7B, other lengths", "expr_7b_lengths"),
        ("7B, estimated profile", "expr_7b_estimate"),
        ("32B", "expr_32b"),
        ("70B", "expr_70b"),
    ):
        if name not in tables:
            continue
        for row in tables[name]["methods"]:
            if row["method"] in (LOBRA, OURS, OURS_POWERS):
                shares = [
                    _percent(row, f"less_than_{baseline}")
                    for baseline in ("sequential", "fused", "sequential_balanced", "fused_balanced")
                ]
                rows.append([label, row["method"], published, *shares])
    header = ["experiment", "method", "published", f"against {SEQUENTIAL}", f"against {FUSED}"]
    header += [f"{SEQUENTIAL}, our dispatch", f"{FUSED}, our dispatch"]
    return markdown(header, rows)


def _methods(tables: Tables) -> list[str]:
    rows = []
    for model, own in _models(tables):
        for row in own["methods"]:
            reach = (float(row["gpu_seconds_high"]) - float(row["gpu_seconds_low"])) / 2
            rows.append(
                [
                    model,
                    row["method"],
                    row["plan"],
                    f"{float(row['step_time_s']):.2f}",
                    f"{float(row['gpu_seconds']):.1f} ± {reach:.1f}",
                    f"{100 * float(row['padding']):.1f} %",
                    f"{100 * float(row['idle']):.1f} %",
                ]
            )
    header = ["model", "method", "plan", "step s", "GPU-seconds", "padding", "idle"]
    return markdown(header, rows)


def _ablation(tables: Tables) -> list[str]:
    rows = [
        [
            model,
            {"LobRA": LOBRA, "ours": OURS}.get(row["plan_of"], FUSED),
            row["rung"],
            f"{float(row['gpu_seconds']):.1f}",
            "" if row["plan_of"] == "homogeneous" else _percent(row, "less_than_fused"),
        ]
        for model, own in _models(tables)
        for row in own["ablation"]
    ]
    return markdown(["model", "plan", "rung", "GPU-seconds", f"less than {FUSED}"], rows)


def _deployments(tables: Tables) -> list[str]:
    rows = []
    for model, own in _models(tables):
        for row in own["planning_time"]:
            if row["pattern"] not in ("PRUNE, proposed", "BALANCE, proposed"):
                continue
            theirs, found = row["published_plan_step_s"], row["step_time_s"]
            ratio = f"{100 * (float(theirs) / float(found) - 1):+.1f} %" if theirs and found else ""
            end = " (stopped)" if row["stopped"] == "True" else ""
            rows.append(
                [
                    f"{model}, {row['num_gpus']} GPUs, {row['tasks']} tasks",
                    row["published_plan"],
                    row["pattern"] + end,
                    row["plan"] or "none",
                    {"True": "yes", "False": "no"}.get(row["same_plan"], ""),
                    f"{float(theirs):.2f}" if theirs else "does not fit",
                    f"{float(found):.2f}" if found else "",
                    ratio,
                ]
            )
    header = ["experiment", "published plan", "LobRA's method here", "its plan", "same"]
    header += ["published plan, step s", "plan found, step s", "published against found"]
    return markdown(header, rows)


def _sequential(tables: Tables) -> list[str]:
    rows = []
    for model, own in _models(tables):
        for row in own["sequential"]:
            fits = row["published_plan_fits"] == "True"
            rows.append(
                [
                    model,
                    row["task"],
                    row["longest"],
                    row["published_plan"],
                    row["our_plan"],
                    "yes" if row["same"] == "True" else "no",
                    f"{100 * float(row['difference']):+.1f} %" if fits else "does not fit",
                ]
            )
    header = ["model", "data set", "longest", "published", "best here", "same", "step, best here"]
    return markdown(header, rows)


def _planning(tables: Tables) -> list[str]:
    rows = []
    for row in tables["expr_70b"]["planning_time"]:
        if row["tasks"] != "4":
            continue
        seconds = f"{float(row['seconds']):.1f}" + (
            " (stopped)" if row["stopped"] == "True" else ""
        )
        bound = f"{float(row['lower_bound_s']):.2f}" if row["lower_bound_s"] else ""
        rows.append(
            [
                row["num_gpus"],
                row["pattern"],
                row["published_s"],
                "refused" if row["failed"] and "would have to" in row["failed"] else seconds,
                f"{float(row['processor_s']):.1f}" if row.get("processor_s") else "",
                f"{float(row['step_time_s']):.2f}" if row["step_time_s"] else "none",
                bound,
                row["plan"],
            ]
        )
    header = [
        "GPUs",
        "planner",
        "published s",
        "here s",
        "processor s",
        "step s",
        "bound s",
        "plan",
    ]
    return markdown(header, rows)


def _scale(column: str) -> Callable[[Tables], list[str]]:
    def table(tables: Tables) -> list[str]:
        rows = []
        for row in tables["expr_70b"][f"scale_{column}"]:
            own, published = float(row["relative"]), row["published"]
            rows.append(
                [
                    row[column],
                    row["method"],
                    published,
                    f"{own:.3f}",
                    f"{100 * (own / float(published) - 1):+.0f} %" if published else "",
                    f"{float(row['relative_own']):.3f}",
                    f"{float(row['step_time_s']):.2f}",
                    row["plan"],
                ]
            )
        header = [column, "method", "published", "here", "difference", "to its own first"]
        header += ["step s", "plan"]
        return markdown(header, rows)

    return table


def _buckets(tables: Tables) -> list[str]:
    rows = []
    for model, own in _models(tables):
        for owner, name in (("LobRA", LOBRA), ("ours", OURS)):
            curve = [row for row in own["buckets"] if row["plan_of"] == owner]
            rows.append(
                [model, name, *(f"{float(row['step_time_s']):.2f}" for row in curve)],
            )
        padding = [f"{100 * float(row['padding']):.1f} %" for row in curve]
        rows.append([model, "padding", *padding])
    return markdown(["model", "", *(row["buckets"] for row in curve)], rows)


def _steps(tables: Tables) -> list[str]:
    rows = [
        [
            row["plan"],
            row["seq_len"],
            row["chunks"],
            row["measured_lobra_s"],
            row["measured_nemo_s"],
            f"{float(row['predicted_s']):.3f}",
            f"{100 * float(row['difference']):+.1f} %",
        ]
        for row in tables["expr_7b"]["homogeneous_steps"]
    ]
    header = ["plan", "tokens", "chunks", "published, LobRA s", "NeMo s", "predicted s", "to LobRA"]
    return markdown(header, rows)


def _throughput(tables: Tables) -> list[str]:
    rows = [
        [
            row["layout"],
            row["seq_len"],
            row["published_ktokens_s_gpu"],
            f"{float(row['predicted_ktokens_s_gpu']):.2f}",
            f"{100 * float(row['difference']):+.0f} %",
            f"{float(row['no_bubble_ktokens_s_gpu']):.2f}",
            f"{100 * float(row['no_bubble_difference']):+.0f} %",
        ]
        for row in tables["expr_7b"]["throughput"]
    ]
    header = ["layout", "tokens", "published", "16 chunks", "", "no bubble", ""]
    return markdown(header, rows)


def _lengths(tables: Tables) -> list[str]:
    rows = [
        [
            row["dataset"],
            *(
                f"{row[f'{name}_published']} / {float(row[name]):.4g}"
                for name in ("mean", "skewness", "kurtosis")
            ),
            row["longest"],
        ]
        for row in tables["expr_70b"]["lengths"]
    ]
    header = ["data set", "mean, published / used", "skewness", "kurtosis", "longest used"]
    return markdown(header, rows)


def _baselines(tables: Tables) -> list[str]:
    rows = [
        [
            row["method"],
            f"{float(row['tokens_per_s']):,.0f}",
            f"{float(row['step_s']):.2f}",
            f"{float(row['memory_mib']):.0f}",
            f"{float(row['first_loss']):.6f}",
            f"{float(row['last_loss']):.6f}",
        ]
        for row in tables["baselines"]["baselines"]
    ]
    header = ["method", "tokens/s", "step s", "memory MiB", "first loss", "last loss"]
    return markdown(header, rows)


TABLES: dict[str, Callable[[Tables], list[str]]] = {
    "reduction": _reduction,
    "methods": _methods,
    "ablation": _ablation,
    "deployments": _deployments,
    "sequential": _sequential,
    "planning": _planning,
    "scale_gpus": _scale("gpus"),
    "scale_tasks": _scale("tasks"),
    "buckets": _buckets,
    "steps": _steps,
    "throughput": _throughput,
    "lengths": _lengths,
    "baselines": _baselines,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduction", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--collect", type=Path, help="folder of experiments to copy tables from")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    try:
        if args.collect:
            collect(args.collect, args.results)
        if not args.page.is_file():
            raise ConfigError(f"{args.page}: no such page")
        page = args.page.read_text(encoding="utf-8")
        write_atomic(args.page, fill(page, read_results(args.results)))
    except ConfigError as error:
        print(f"reproduction: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
