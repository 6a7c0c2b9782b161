"""Folders of runs, simulations and experiments: resumed or reported."""

from __future__ import annotations

import json
from typing import Any

from tests.bad_inputs.case import FORMATS, Case

STATE = json.loads((FORMATS / "run/checkpoints/step_2/state.json").read_text())
CONFIG = (FORMATS / "run/config.yaml").read_text()
LINES = (FORMATS / "run/metrics.jsonl").read_text().splitlines()
_STATE = "run/checkpoints/step_2/state.json"
STATES: dict[str, tuple[str | bytes | Any, str]] = {
    "empty": ("", "not usable"),
    "list": ([1], "not usable"),
    "text": ('"x"', "not usable"),
    "cut": (json.dumps(STATE)[:200], "not usable"),
    "latin": (b'{"seed": "\xe9"}', "not usable"),
    "digits": ('{"seed": ' + "9" * 5000 + "}", "not usable"),
    "deep": ("[" * 100_000, "not usable"),
    "later": (STATE | {"format": 4}, "format 4"),
    "format": (STATE | {"format": [1]}, "format"),
    "step": (STATE | {"step": -1}, "step"),
    "seed": (STATE | {"seed": "x"}, "seed"),
    "tasks": (STATE | {"tasks": 7}, "not usable"),
    "task": (STATE | {"tasks": [7]}, "not usable"),
    "task-names": (STATE | {"tasks": [{"name": [1]}]}, "not usable"),
    "factors": (STATE | {"speed_factors": [0]}, "speed_factors"),
    "stranger": (STATE | {"more": 1}, "more"),
    "day": (STATE | {"data_day": "2026-13-45"}, "data_day"),
    "changes": (STATE | {"changes": [{"id": "a", "step": -1}]}, "changes[0].step"),
    "lives": (STATE | {"lives": 7}, "not usable"),
}


def _line(**changes: Any) -> str:
    return "\n".join([json.dumps({**json.loads(LINES[0]), **changes}), *LINES[1:]]) + "\n"


METRICS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "has not finished a step"),
    "words": ("hello\nworld\n", "metrics.jsonl:1: not a step's line"),
    "list": ("[1]\n" + LINES[1] + "\n", "metrics.jsonl:1: not a step's line"),
    "latin": (b"\xe9\n" + LINES[1].encode() + b"\n", "metrics.jsonl:1: not a step's line"),
    "digits": ("9" * 5000 + "\n" + LINES[1] + "\n", "metrics.jsonl:1: not a step's line"),
    "deep": ("[" * 100_000 + "\n" + LINES[1] + "\n", "metrics.jsonl:1: not a step's line"),
    "step": (_line(step="x"), "metrics.jsonl:1: not a step's line: step"),
    "time": (_line(step_time_s=0), "metrics.jsonl:1: not a step's line: step_time_s"),
    "time-text": (_line(step_time_s="x"), "step_time_s"),
    "tokens": (_line(padded_tokens=0), "padded_tokens"),
    "tasks": (_line(tasks=7), "tasks"),
    "task": (_line(tasks={"few": 7}), "tasks.few"),
    "loss": (_line(tasks={"few": {"loss": "x"}}), "tasks.few.loss"),
    "replicas": (_line(replicas=[]), "replicas"),
    "replica": (_line(replicas=[{"layout": 7}]), "replicas[0]"),
    "missing": ('{"step": 0}\n' + LINES[1] + "\n", "is missing"),
}
CONFIGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "config.yaml"),
    "list": ("[1]", "want an object"),
    "words": ("hello", "want an object"),
    "cut": (CONFIG[:100] + "\n: [", "config.yaml"),
    "latin": (b"device: \xe9", "not UTF-8"),
    "tasks": (CONFIG.replace("tasks:\n", "tasks: 7\nmore:\n"), "tasks"),
    "plan": ("versions: {}\ntasks: []\ndevice: cpu\nplan: []\n", "plan"),
    "entry": ("versions: {}\ntasks: []\ndevice: cpu\nplan: [{dp: 1}]\n", "plan[0]"),
    "device": (CONFIG.replace("device: cpu", "device: 7"), "device"),
    "versions": (CONFIG.replace("versions:", "versions: 7\nold:"), "versions"),
    "tag": (CONFIG + "x: !!python/name:os.system\n", "is not allowed"),
}
SIMULATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"simulation.json": "7"}, "a list of runs is expected"),
    "empty": ({"simulation.json": "[]"}, "a list of runs is expected"),
    "cut": ({"simulation.json": "[{"}, "not valid JSON"),
    "no-steps": ({"simulation.json": '[{"name": "a"}]'}, "steps.csv"),
    "fields": (
        {"simulation.json": '[{"name": "a"}]', "steps.csv": "name,gpu_seconds\n"}, "lacks",
    ),
    "words": (
        {"simulation.json": '[{"name": "a"}]', "steps.csv": "name,gpu_seconds\na,x\n"},
        "simulation.json",
    ),
    "columns": ({"simulation.json": '[{"name": "a"}]', "steps.csv": "x\n1\n"}, "lacks"),
    "about-list": ({"provenance.json": "[1]"}, "an object is expected"),
    "no-table": ({"provenance.json": "{}"}, "no table yet"),
    "about-cut": ({"provenance.json": "{"}, "not valid JSON"),
    "latin-table": ({"provenance.json": "{}", "methods.csv": b"a\n\xe9\n"}, "not UTF-8"),
}  # fmt: skip


def _cases() -> dict[str, Case]:
    cases = {}
    for name, (content, says) in STATES.items():
        cases[f"state-{name}"] = Case(
            ("run/checkpoints/step_2", "state.json", says), {_STATE: content}, command="resume"
        )
    for name, (text, says) in METRICS.items():
        cases[f"metrics-{name}"] = Case((says,), {"run/metrics.jsonl": text}, command="report")
    for name, (text, says) in CONFIGS.items():
        cases[f"config-{name}"] = Case(
            ("run/config.yaml", says), {"run/config.yaml": text}, command="report"
        )
    for name, (files, says) in SIMULATIONS.items():
        placed = {f"sim/{path}": content for path, content in files.items()}
        cases[f"simulation-{name}"] = Case(("sim", says), placed, ("sim",), "report-folder")
    return cases


_MOMENTS = "run/checkpoints/step_2/moments/few.safetensors"
CASES = _cases() | {
    "state-pipe": Case(("holds no checkpoint",), {_STATE: None}, command="resume"),
    "moments-empty": Case(
        ("moments/few.safetensors is damaged",), {_MOMENTS: b""}, command="resume"
    ),
    "moments-pipe": Case(("is missing",), {_MOMENTS: None}, command="resume"),
    "no-such-step": Case(("has only the steps 2",), None, ("7",), "resume"),
    "used": Case(("--output-dir run: already holds a run",), None, ("--output-dir", "run")),
    "revive-nobody": Case(
        ("--revive nobody", "no such task"), None, ("--revive", "nobody"), "resume"
    ),
    "other-seed": Case(("was made with --seed 0",), None, ("--seed", "5"), "resume"),
    "metrics-pipe": Case(("it is no regular file",), {"run/metrics.jsonl": None}, command="report"),
    "no-run": Case(("none: no such folder",), None, ("none",), "report-folder"),
    "long-name": Case(("File name too long",), None, ("x" * 300,), "report-folder"),
    "not-a-run": Case(("data: none of",), None, ("data",), "report-folder"),
}
