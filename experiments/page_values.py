"""The numbers in the prose of docs/reproduction.md, each read from the experiments' CSVs.

A number stands between ``<!--v NAME arguments-->`` and ``<!--/v-->``; NAME is one of ``VALUES``.
What no table has yet reads "(not made yet)".
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence

from experiments.published import REDUCTION
from experiments.study import DYNAMIC, FIXED, FUSED, LOBRA, OURS, OURS_POWERS, SEQUENTIAL
from lobra.common.errors import ConfigError

Row = Mapping[str, str]
Tables = Mapping[str, Mapping[str, Sequence[Row]]]  # experiment -> table -> rows
MISSING = "(not made yet)"
MODELS = ("7b", "32b", "70b")
LOADS = ("load_at_start", "load_at_end")
NAMES = {
    "lobra": LOBRA,
    "ours": OURS,
    "powers": OURS_POWERS,
    "fused": FUSED,
    "fused_16": FUSED + FIXED,
    "fused_balanced": f"{FUSED}, our dispatch",
    "fused_dynamic": FUSED + DYNAMIC,
    "sequential": SEQUENTIAL,
    "sequential_best": f"{SEQUENTIAL}, best plans",
    "sequential_balanced": f"{SEQUENTIAL}, our dispatch",
}


def fill_values(page: str, tables: Tables) -> str:
    """Return the page with every number of its prose made anew.

    Raises
    ------
    ConfigError
        If the page asks for a number that is not known here.
    """

    def replaced(match: re.Match[str]) -> str:
        name, *arguments = shlex.split(match[1])
        if name not in VALUES:
            raise ConfigError(f"value {name}: unknown; known are {', '.join(VALUES)}")
        try:
            text = VALUES[name](tables, *arguments)
        except (KeyError, ValueError, IndexError, ZeroDivisionError):
            text = MISSING
        except TypeError as error:
            raise ConfigError(f"value {match[1]}: {error}") from error
        return f"<!--v {match[1]}-->{text}<!--/v-->"

    return re.sub(r"<!--v (.+?)-->.*?<!--/v-->", replaced, page, flags=re.DOTALL)


def _row(rows: Sequence[Row], **wanted: str) -> Row:
    for row in rows:
        if all(row[key] == value for key, value in wanted.items()):
            return row
    raise KeyError(wanted)


def _method(tables: Tables, experiment: str, method: str) -> Row:
    return _row(tables[f"expr_{experiment}"]["methods"], method=NAMES[method])


def _saved(tables: Tables, experiment: str, method: str, baseline: str) -> str:
    """Share of the baseline's GPU-seconds that the method saves."""
    return f"{100 * float(_method(tables, experiment, method)[f'less_than_{baseline}']):.2f} %"


def _against_range(tables: Tables, experiment: str, method: str, baseline: str) -> str:
    """Where the saved share is in the published range."""
    share = float(_method(tables, experiment, method)[f"less_than_{baseline}"])
    low, high = REDUCTION
    if share < low:
        return f"{100 * (low - share):.2f} points below the published range"
    if share > high:
        return f"{100 * (share - high):.2f} points above the published range"
    return "inside the published range"


def _step(tables: Tables, experiment: str, method: str) -> str:
    return f"{float(_method(tables, experiment, method)['step_time_s']):.2f} s"


def _plan(tables: Tables, experiment: str, method: str) -> str:
    return f"`{_method(tables, experiment, method)['plan']}`"


def _compared(tables: Tables, experiment: str, method: str, other: str) -> str:
    """The method's step relative to another's."""
    one, two = (float(_method(tables, experiment, name)["step_time_s"]) for name in (method, other))
    return f"{100 * (one / two - 1):+.1f} %"


def _scale_row(tables: Tables, column: str, value: str, method: str) -> Row:
    rows = tables["expr_70b"][f"scale_{column}"]
    return _row(rows, **{column: value, "method": NAMES[method]})


def _scale(tables: Tables, column: str, method: str, name: str, *values: str) -> str:
    """A curve's values: ``relative`` or ``relative_own``, or ``idle`` in per cent."""
    found = [float(_scale_row(tables, column, value, method)[name]) for value in values]
    if name == "idle":
        return f"{', '.join(f'{100 * value:.0f}' for value in found)} %"
    return ", ".join(f"{value:.2f}" for value in found)


def _scale_step(tables: Tables, column: str, value: str, method: str) -> str:
    return f"{float(_scale_row(tables, column, value, method)['step_time_s']):.1f} s"


def _scale_compared(tables: Tables, column: str, method: str, other: str, *values: str) -> str:
    """A curve relative to another one, value by value."""
    ratios = []
    for value in values:
        one, two = (
            float(_scale_row(tables, column, value, name)["step_time_s"])
            for name in (method, other)
        )
        ratios.append(f"{100 * (one / two - 1):+.1f}")
    return f"{', '.join(ratios)} %"


def _by_number_of_buckets(tables: Tables) -> str:
    """Of what dynamic buckets save on 16 GPUs, the share that 16 fixed ones save too."""
    seven, fixed, dynamic = (
        float(_scale_row(tables, "gpus", "16", name)["step_time_s"])
        for name in ("fused", "fused_16", "fused_dynamic")
    )
    return f"{100 * (seven - fixed) / (seven - dynamic):.0f} %"


def _bucket_drop(tables: Tables, experiment: str, owner: str, first: str, last: str) -> str:
    """By how much the step falls between two numbers of buckets."""
    rows = tables[f"expr_{experiment}"]["buckets"]
    one, two = (
        float(_row(rows, plan_of=owner, buckets=number)["step_time_s"]) for number in (first, last)
    )
    return f"{100 * (1 - two / one):.0f} %"


def _capacity(tables: Tables, experiment: str, layout: str, tasks: str) -> str:
    """Tokens of a layout by the estimate for so many tasks."""
    own = tables[f"expr_{experiment}"]
    model = experiment.split("_")[0].upper()
    name = f"max_tokens_{model}_{tasks}tasks"
    tp, pp = layout.strip("<>").split(",")
    return f"{int(_row(own[name], tp=tp, pp=pp)['max_tokens']):,}"


def _same(tables: Tables, experiment: str) -> str:
    """How many of Task-Sequential's published plans are the best here."""
    rows = tables[f"expr_{experiment}"]["sequential"]
    return f"{sum(row['same'] == 'True' for row in rows)} of {len(rows)}"


def _found_by(tables: Tables, experiment: str, gpus: str, tasks: str) -> str:
    """The searches that end with the published plan."""
    rows = tables[f"expr_{experiment}"]["planning_time"]
    found = [
        row["pattern"]
        for row in rows
        if (row["num_gpus"], row["tasks"], row["same_plan"]) == (gpus, tasks, "True")
    ]
    return "; ".join(found) or "none"


def _planning(tables: Tables, gpus: str, pattern: str, name: str) -> str:
    """A value of the planning table of 70B with 4 tasks."""
    row = _row(tables["expr_70b"]["planning_time"], num_gpus=gpus, tasks="4", pattern=pattern)
    return f"{float(row[name]):g}" if name == "gpus_used" else f"{float(row[name]):.1f} s"


def _step_error(tables: Tables, which: str) -> str:
    """Mean or largest error of predicted homogeneous steps."""
    rows = tables["expr_7b"]["homogeneous_steps"]
    errors = [abs(100 * float(row["difference"])) for row in rows]
    return f"{sum(errors) / len(errors) if which == 'mean' else max(errors):.1f} %"


def _throughput(tables: Tables, name: str, *layouts: str) -> str:
    """Least and most difference of throughput, of these layouts or all without a pipeline."""
    rows = [
        row
        for row in tables["expr_7b"]["throughput"]
        if (row["layout"] in layouts if layouts else row["layout"].endswith(",1>"))
    ]
    shares = [100 * float(row[name]) for row in rows]
    return f"{min(shares):+.0f} to {max(shares):+.0f} %"


def _run_rows(tables: Tables) -> list[Row]:
    return [row for model in MODELS for row in tables[f"expr_{model}"]["runs"]]


def _minutes(tables: Tables, name: str = "seconds") -> str:
    """Minutes of the three experiments: of the runs (wall-clock), or a sum over all cells."""
    if name != "seconds":  # the last run of each says it of all its cells
        rows = [tables[f"expr_{model}"]["runs"][-1] for model in MODELS]
        return f"{sum(float(row[name]) for row in rows) / 60:.1f} minutes"
    rows = _run_rows(tables)
    for model in MODELS:
        runs = tables[f"expr_{model}"]["runs"]
        if sum(int(row["computed"]) for row in runs) < int(runs[-1]["cells"]):
            return f"(not known: some cells of {model} were made by a run that was interrupted)"
    return f"{sum(float(row['seconds']) for row in rows) / 60:.1f} minutes"


def _load(tables: Tables) -> str:
    loads = [float(row[end]) for row in _run_rows(tables) for end in LOADS]
    return f"{min(loads):.1f} to {max(loads):.1f}"


def _workers(tables: Tables) -> str:
    found = sorted({(row["cores"], row["workers"]) for row in _run_rows(tables)})
    return "; ".join(f"{cores} cores, {workers} processes" for cores, workers in found)


def _baseline(tables: Tables, name: str) -> str:
    """A value that all rows of the real baselines share."""
    return tables["baselines"]["baselines"][0][name]


def _rise(tables: Tables, method: str, value: str) -> str:
    """How many times the GPU-seconds of four tasks so many tasks take."""
    return f"{float(_scale_row(tables, 'tasks', value, method)['relative_own']):.2f}"


VALUES: dict[str, Callable[..., str]] = {
    "saved": _saved,
    "against_range": _against_range,
    "step": _step,
    "plan": _plan,
    "compared": _compared,
    "scale": _scale,
    "scale_step": _scale_step,
    "scale_compared": _scale_compared,
    "by_number_of_buckets": _by_number_of_buckets,
    "bucket_drop": _bucket_drop,
    "capacity": _capacity,
    "same": _same,
    "found_by": _found_by,
    "planning": _planning,
    "step_error": _step_error,
    "throughput": _throughput,
    "minutes": _minutes,
    "load": _load,
    "workers": _workers,
    "baseline": _baseline,
    "rise": _rise,
}
