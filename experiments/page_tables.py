"""The tables of docs/reproduction.md, made from the experiments' CSVs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from experiments.methods import DYNAMIC, FUSED, LOBRA, OURS, OURS_POWERS, PACKED, SEQUENTIAL
from experiments.published import REDUCTION, SETUPS

Row = Mapping[str, str]
Tables = Mapping[str, Mapping[str, Sequence[Row]]]  # experiment -> table -> rows
MISSING = "(not made yet)"
BASELINES = (
    *("sequential", "fused", "sequential_balanced", "fused_balanced"),
    *("sequential_dynamic", "fused_dynamic"),
)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _models(tables: Tables) -> list[tuple[str, Mapping[str, Sequence[Row]]]]:
    return [(m, tables[f"expr_{m.lower()}"]) for m in SETUPS if f"expr_{m.lower()}" in tables]


def _percent(row: Row, column: str) -> str:
    if not row.get(column):
        return MISSING
    mean, low, high = (100 * float(row[f"{column}{end}"]) for end in ("", "_low", "_high"))
    return f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def _reduction(tables: Tables) -> list[str]:
    published = f"{100 * REDUCTION[0]:.2f} to {100 * REDUCTION[1]:.2f} %"
    rows = []
    for label, name in (
        ("7B", "expr_7b"),
        ("7B, another seed", "expr_7b_seed1"),
        ("7B, estimated profile", "expr_7b_estimate"),
        ("32B", "expr_32b"),
        ("70B", "expr_70b"),
    ):
        if name not in tables:
            continue
        for row in tables[name]["methods"]:
            if row["method"] in (LOBRA, OURS, OURS_POWERS, *PACKED.values()):
                shares = [_percent(row, f"less_than_{baseline}") for baseline in BASELINES]
                rows.append([label, row["method"], published, *shares])
    header = ["experiment", "method", "published", f"against {SEQUENTIAL}", f"against {FUSED}"]
    header += [f"{name}, our dispatch" for name in (SEQUENTIAL, FUSED)]
    header += [f"{name}{DYNAMIC}" for name in (SEQUENTIAL, FUSED)]
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
            row.get("buckets", MISSING),
            f"{float(row['gpu_seconds']):.1f}",
            _percent(row, "less_than_fused"),
            _percent(row, "less_than_fused_16_fixed"),
        ]
        for model, own in _models(tables)
        for row in own["ablation"]
    ]
    header = ["model", "plan", "rung", "buckets", "GPU-seconds", f"less than {FUSED}"]
    header += ["less than the same with 16 fixed buckets"]
    return markdown(header, rows)


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
                    row.get("gpus_used") or "",
                    {"True": "yes", "False": "no"}.get(row["same_plan"], ""),
                    f"{float(theirs):.2f}" if theirs else "does not fit",
                    f"{float(found):.2f}" if found else "",
                    ratio,
                ]
            )
    header = ["experiment", "published plan", "method here", "its plan", "GPUs used", "same"]
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
        end = " (stopped)" if row["stopped"] == "True" else ""
        refused = row["failed"] and "would have to" in row["failed"]
        seconds = f"{float(row['seconds']):.1f}{end}"
        rows.append(
            [
                row["num_gpus"],
                row["pattern"],
                row["published_s"],
                "refused" if refused else seconds,
                _number(row, "processor_s", 1),
                _number(row, "search_s", 1),
                row.get("gpus_used") or "",
                _number(row, "objective_s"),
                _number(row, "own_bound_s"),
                _number(row, "step_time_s") or "none",
                _number(row, "lower_bound_s"),
                row["plan"],
            ]
        )
    header = ["GPUs", "planner", "published s", "here s", "processor s", "search alone s"]
    header += ["GPUs used", "LobRA's objective s", "its bound s", "step s", "bound s", "plan"]
    return markdown(header, rows)


def _number(row: Row, column: str, digits: int = 2) -> str:
    return f"{float(row[column]):.{digits}f}" if row.get(column) else ""


def _scale(column: str) -> Callable[[Tables], list[str]]:
    def table(tables: Tables) -> list[str]:
        rows = []
        for row in tables["expr_70b"][f"scale_{column}"]:
            own, published = float(row["relative"]), row["published"]
            rows.append(
                [
                    row[column],
                    row["method"] + (" (inferred)" if row.get("plan_is") == "inferred" else ""),
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


def _made(tables: Tables) -> list[str]:
    rows = []
    for name, own in tables.items():
        if "provenance" not in own:
            continue
        (about,) = own["provenance"]
        runs = own.get("runs", [])
        commit = about.get("commit", "")[:10] or MISSING
        changed = " and changes" if about.get("changed_since_commit") == "True" else ""
        rows.append(
            [
                name,
                about.get("profile", ""),
                about.get("lengths", ""),
                f"{about.get('steps', '')}, seed {about.get('seed', '')}",
                about.get("written", ""),
                commit + changed,
                about.get("code", ""),
                " + ".join(f"{float(row['seconds']):.0f}" for row in runs) or MISSING,
                ", ".join(f"{row['computed']} of {row['cells']}" for row in runs) or MISSING,
            ]
        )
    header = ["results", "profile", "lengths", "steps", "written", "commit", "digest of code"]
    return markdown([*header, "run s", "cells computed in it"], rows)


TABLES: dict[str, Callable[[Tables], list[str]]] = {
    "made": _made,
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
