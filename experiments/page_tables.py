"""The tables of docs/reproduction.md, and numbers of its text, made from the experiments' CSVs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.methods import DYNAMIC, FUSED, LOBRA, OURS, SEQUENTIAL
from experiments.published import REDUCTION, SETUPS

Row = Mapping[str, str]
Tables = Mapping[str, Mapping[str, Sequence[Row]]]  # experiment -> table -> rows

#: What an experiment is called on the page.
LABELS = {
    "expr_7b": "7B",
    "expr_7b_seed1": "7B, another seed",
    "expr_7b_estimate": "7B, estimated profile",
    "expr_32b": "32B",
    "expr_70b": "70B",
}
SEED = "expr_7b_seed1"
PACKED = "packed"  # the method that tables made since 26 November 2026 have
#: What a plan is compared with: a column's name in the CSVs -> in the page's table.
BASELINES = {
    "sequential": SEQUENTIAL,
    "fused": FUSED,
    "fused_dynamic": f"{FUSED}{DYNAMIC}",
}
LOBRA_PLANNERS = ("BALANCE, all layouts", "BALANCE, proposed", "PRUNE, proposed")
BUCKETS = ("4", "8", "12", "16", "32")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    first, *others = (f"| {' | '.join(line)} |" for line in [header, *rows])
    return "\n".join([first, f"|{'---|' * len(header)}", *others])


def of_model(model: str) -> str:
    """Return the name of a model's experiment."""
    return f"expr_{model.lower()}"


def find(rows: Sequence[Row], **wanted: str) -> Row:
    """Return the row with these values; KeyError if there is none."""
    found = find_all(rows, **wanted)
    if not found:
        raise KeyError(f"no row with {wanted}")
    return found[0]


def find_all(rows: Sequence[Row], **wanted: str) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def percent(value: str | float, digits: int = 0, sign: str = "") -> str:
    """Return a share in percent, without the sign of it."""
    return f"{100 * float(value):{sign}.{digits}f}"


def made(tables: Tables) -> str:
    """Return when the experiments were run, and by which commit."""
    runs: dict[str, list[str]] = {}
    for name, label in LABELS.items():
        (about,) = tables[name]["provenance"]
        changed = " with changes" if about["changed_since_commit"] == "True" else ""
        when = f"on {about['written'].split()[0]} by commit {about['commit'][:10]}{changed}"
        runs.setdefault(when, []).append(label)
    if len(runs) == 1:
        return next(iter(runs))
    return "; ".join(f'"{label}" {when}' for when, labels in runs.items() for label in labels)


def methods(tables: Tables) -> str:
    """Return the GPU-seconds a step takes by every method."""
    names = dict.fromkeys(
        row["method"] for model in SETUPS for row in tables[of_model(model)]["methods"]
    )
    rows = []
    for name in names:
        own = [find_all(tables[of_model(model)]["methods"], method=name) for model in SETUPS]
        rows.append(
            [name, *("".join(number(row, "gpu_seconds", 0) for row in found) for found in own)]
        )
    return markdown(["method", *SETUPS], rows)


def savings(tables: Tables) -> str:
    """Return by how much less GPU-seconds the plans take than each baseline."""
    rows = [
        [label, row["method"], *(percent(row[f"less_than_{name}"], 1) for name in BASELINES)]
        for experiment, label in LABELS.items()
        for row in tables[experiment]["methods"]
        if experiment != SEED and row["method"] in (LOBRA, OURS, PACKED)
    ]
    return markdown(["less than, in %", "", *BASELINES.values()], rows)


def ablation(tables: Tables) -> str:
    """Return by how much less GPU-seconds each rung takes than Task-Fused as published."""
    whose = {"homogeneous": FUSED, "LobRA": LOBRA, "ours": OURS}
    rows = []
    for row in tables[of_model("7B")]["ablation"]:
        same = {"plan_of": row["plan_of"], "rung": row["rung"]}
        line = [whose[row["plan_of"]], f"{row['rung']}, {row['buckets']}"]
        for model in SETUPS:
            line.append(
                percent(find(tables[of_model(model)]["ablation"], **same)["less_than_fused"])
            )
        rows.append(line)
    return markdown(["less, in %", "dispatch and buckets", *SETUPS], rows)


def deployments(tables: Tables) -> str:
    """Return the published plans' steps beside those of the plans that are found here."""
    rows = []
    for model in SETUPS:
        planned = tables[of_model(model)]["planning_time"]
        sizes = dict.fromkeys((row["num_gpus"], row["tasks"]) for row in planned)
        for gpus, tasks in sizes:
            own = [row for row in planned if (row["num_gpus"], row["tasks"]) == (gpus, tasks)]
            theirs = [row for row in own if row["pattern"].endswith("proposed")]
            best = min(float(row["step_time_s"]) for row in theirs if row["step_time_s"])
            same = [row["pattern"] for row in own if row["same_plan"] == "True"]
            exact = find(own, pattern="EXACT, all layouts")
            line = [f"{model}, {gpus} GPUs, {tasks} tasks"]
            line += [number(own[0], "published_plan_step_s"), f"{best:.2f}"]
            line += [number(exact, "step_time_s"), number(exact, "lower_bound_s")]
            rows.append([*line, "; ".join(same) or "none"])
    header = ["step, s", "published plan", "LobRA's methods", "EXACT", "lower bound"]
    return markdown([*header, "published plan found by"], rows)


def number(row: Row, column: str, digits: int = 2) -> str:
    """Return a number, empty where the row has none."""
    return f"{float(row[column]):.{digits}f}" if row[column] else ""


def planning(tables: Tables) -> str:
    """Return how long planning 70B with four tasks takes, published and here."""
    rows = []
    own = [row for row in tables[of_model("70B")]["planning_time"] if row["tasks"] == "4"]
    for gpus in dict.fromkeys(row["num_gpus"] for row in own):
        line = [gpus, number(find(own, num_gpus=gpus, pattern="EXACT, all layouts"), "seconds", 0)]
        for pattern in LOBRA_PLANNERS:
            row = find(own, num_gpus=gpus, pattern=pattern)
            here = ">20" if row["stopped"] == "True" else number(row, "seconds", 0)
            published = row["published_s"].replace("over ", ">")
            line += [published, "refused" if row["failed"] else here]
        rows.append(line)
    pairs = [cell for pattern in LOBRA_PLANNERS for cell in (f"{pattern}: published", "here")]
    return markdown(["GPUs", "EXACT", *pairs], rows)


def scaling(tables: Tables, column: str) -> str:
    """Return GPU-seconds over the numbers of GPUs or tasks, Task-Fused's first being 1."""
    own = tables[of_model("70B")][f"scale_{column}"]
    rows = []
    for size in dict.fromkeys(row[column] for row in own):
        here = {row["method"]: number(row, "relative") for row in find_all(own, **{column: size})}
        published = [
            find(own, **{column: size, "method": name})["published"] for name in (FUSED, OURS)
        ]
        line = [size, published[0], here[FUSED], published[1], here.get(LOBRA, ""), here[OURS]]
        rows.append([*line, here[f"{FUSED}{DYNAMIC}"]])
    header = [column, f"{FUSED}: published", "here", "LobRA: published", f"{LOBRA} here", OURS]
    return markdown([*header, f"{FUSED}{DYNAMIC}"], rows)


def buckets(tables: Tables) -> str:
    """Return the step times and padding of LobRA's plans over the number of dynamic buckets."""
    rows = []
    for model in SETUPS:
        own = tables[of_model(model)]["buckets"]
        curve = [find(own, plan_of="LobRA", buckets=count) for count in BUCKETS]
        rows.append([f"{model}: step, s", *(number(row, "step_time_s", 1) for row in curve)])
        rows.append([f"{model}: padding, %", *(percent(row["padding"], 1) for row in curve)])
    return markdown(["buckets", *BUCKETS], rows)


def homogeneous_steps(tables: Tables) -> str:
    """Return the published steps of homogeneous plans beside the predicted ones."""
    rows = [
        [
            row["plan"],
            row["seq_len"],
            row["measured_lobra_s"],
            f"{float(row['predicted_s']):.2f}",
            percent(row["difference"], 1, "+"),
        ]
        for row in tables["expr_7b"]["homogeneous_steps"]
    ]
    return markdown(["plan", "tokens", "published, s", "predicted, s", "difference, %"], rows)


def baselines(tables: Tables) -> str:
    """Return what trainers of other kinds take for the same steps."""
    rows = [
        [
            row["method"],
            f"{float(row['tokens_per_s']):,.0f}",
            f"{float(row['step_s']):.2f}",
            f"{float(row['memory_mib']):.0f}",
        ]
        for row in tables["baselines"]["baselines"]
    ]
    return markdown(["trainer", "tokens/s", "step, s", "memory, MiB"], rows)


def largest_interval(tables: Tables) -> float:
    """Return the largest half of a 95 % interval of GPU-seconds, in percent."""
    rows = [row for model in SETUPS for row in tables[of_model(model)]["methods"]]
    return max(100 * (float(r["gpu_seconds_high"]) / float(r["gpu_seconds"]) - 1) for r in rows)


def change(tables: Tables, model: str) -> float:
    """Return how much longer our plan's steps take than those of LobRA's, in percent."""
    own = tables[of_model(model)]["methods"]
    ours, theirs = (float(find(own, method=name)["gpu_seconds"]) for name in (OURS, LOBRA))
    return 100 * (ours / theirs - 1)


def moved_by_another_seed(tables: Tables) -> float:
    """Return how far another seed moves a saving, in points of percent."""
    return max(
        abs(float(row[column]) - float(find(tables[SEED]["methods"], method=row["method"])[column]))
        * 100
        for row in tables["expr_7b"]["methods"]
        if row["method"] in (LOBRA, OURS)
        for column in (f"less_than_{name}" for name in BASELINES)
    )


def beside_published(tables: Tables, model: str) -> str:
    """Return where LobRA's plan's savings lie beside the published range."""
    row = find(tables[of_model(model)]["methods"], method=LOBRA)
    words = []
    for name in ("sequential", "fused"):
        saved = float(row[f"less_than_{name}"])
        low, high = REDUCTION
        place = "inside the published range"
        if not low <= saved <= high:
            points, side = (saved - high, "above") if saved > high else (low - saved, "below")
            place = f"{100 * points:.2f} points {side} it"
        words.append(place)
    return f"twice {words[0]}" if words[0] == words[1] else " and ".join(words)
