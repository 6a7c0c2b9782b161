"""The tables of an experiment or a simulation, read from its folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lobra.common.documents import parsing, read_json, read_text, reading
from lobra.common.errors import ConfigError
from lobra.layout.trace import FIRST_STAGE_ROW, TRACE_FILE
from lobra.report.intervals import reach_of_mean

YOURS = "your plan"  # begins the names of what was simulated on the plan itself
ABOUT, SIMULATION = "provenance.json", "simulation.json"
Tables = dict[str, list[dict[str, str]]]

TITLES = {
    "methods": "GPU-seconds per step, by method",
    "ablation": "Ablation",
    "sequential": "Task-Sequential: the homogeneous plan of every task",
    "buckets": "Sensitivity to the number of buckets",
    "scale_gpus": "Scalability over GPUs",
    "scale_tasks": "Scalability over tasks",
    "planning_time": "Time to plan",
    "homogeneous_steps": "Homogeneous plans: predicted against measured",
    "throughput": "Throughput of layouts: predicted against published",
    "lengths": "Sequence lengths: published moments, and those used",
    "timeline": "What every replica does in the first sampled step",
    "runs": "Runs of the command that made these tables",
}


def experiments_in(folder: Path) -> list[Path]:
    """Return the experiments of a folder: itself, or those directly below it; else none."""
    if any((folder / name).is_file() for name in (ABOUT, SIMULATION)):
        return [folder]
    if not folder.is_dir():
        return []
    return sorted(
        below
        for below in folder.iterdir()
        if below.is_dir() and any((below / name).is_file() for name in (ABOUT, SIMULATION))
    )


def read_experiment(folder: Path) -> tuple[dict[str, Any], Tables]:
    """Return what an experiment was made from, and its tables by name.

    A folder of ``lobra simulate`` gives the same tables as an experiment, as far as it has them.

    Raises
    ------
    ConfigError
        If a file is missing or not readable.
    """
    if not (folder / ABOUT).is_file():
        with parsing(folder / SIMULATION):
            return _read_simulation(folder)
    tables = {path.stem: _read_csv(path) for path in sorted(folder.glob("*.csv"))}
    tables.pop("steps", None)
    ordered = {name: tables[name] for name in TITLES if tables.get(name)}
    about = _read_json(folder / ABOUT)
    if not isinstance(about, dict):
        raise ConfigError(f"{folder / ABOUT}: an object is expected")
    if not ordered:
        command = about.get("command", "the experiment's command")
        raise ConfigError(f"{folder}: no table yet; to go on where it stopped: {command}")
    return about, ordered


def _read_simulation(folder: Path) -> tuple[dict[str, Any], Tables]:
    runs = _read_json(folder / SIMULATION)
    if not isinstance(runs, list) or not runs or not all(isinstance(r, dict) for r in runs):
        raise ConfigError(f"{folder / SIMULATION}: a list of runs is expected")
    steps = _read_csv(folder / "steps.csv")
    methods = []
    for run in runs:
        own = [float(s["gpu_seconds"]) for s in steps if s["name"] == run["name"]]
        reach = reach_of_mean(own)
        mean = float(run["gpu_seconds"])
        methods.append(
            {
                "method": f"{YOURS}: {run['name']}" if run.get("of_plan") else str(run["name"]),
                "plan": str(run["plan"]),
                "num_gpus": str(run["num_gpus"]),
                "steps": str(run["steps"]),
                "step_time_s": f"{run['mean_s']:.6f}",
                "gpu_seconds": f"{mean:.4f}",
                "gpu_seconds_low": f"{mean - reach:.4f}",
                "gpu_seconds_high": f"{mean + reach:.4f}",
                "idle": f"{run['idle']:.6f}",
                "padding": f"{run['padding']:.6f}",
            }
        )
    tables: Tables = {"methods": methods}
    if (folder / TRACE_FILE).is_file():
        tables["timeline"] = _trace_rows(_read_json(folder / TRACE_FILE))
    about = {"kind": "simulation", "steps": runs[0].get("steps"), "command": "lobra simulate"}
    return about, tables


def _trace_rows(trace: Any) -> list[dict[str, str]]:
    events = trace["traceEvents"]
    layouts = {
        event["pid"]: event["args"]["name"].split(maxsplit=2)[2]  # "replica 0 <1,2> full"
        for event in events
        if event["name"] == "process_name"
    }
    return [
        {
            "plan_of": "the plan",
            "replica": str(event["pid"]),
            "layout": layouts[event["pid"]],
            "start_s": f"{event['ts'] / 1e6:.6f}",
            "end_s": f"{(event['ts'] + event['dur']) / 1e6:.6f}",
            "what": event["name"],
        }
        for event in events
        if event["ph"] == "X" and event["tid"] == FIRST_STAGE_ROW
    ]


def _read_json(path: Path) -> Any:
    return read_json(path)


def _read_csv(path: Path) -> list[dict[str, str]]:
    text = read_text(path)
    with reading(path):
        return [dict(row) for row in csv.DictReader(text.splitlines(keepends=True), strict=True)]
