"""Plans: entries, ranks, what the model or the machine cannot run."""

from __future__ import annotations

from typing import Any

import yaml

from tests.bad_inputs.case import Case

_ENTRY = {"dp": 1, "tp": 1, "pp": 1, "max_tokens": 256}
WRONG: dict[str, tuple[Any, ...]] = {
    "dp": (0, -1, 1.5, "2", 10**6, 10**18, True, [1]),
    "tp": (0, "two", 2.0, 10**9),
    "pp": (0, -2, [2], 10**9),
    "max_tokens": (0, -1, "many", 10**12, 2.5),
    "cp": (0, 2, "x"),
    "memory": ("all", 7, ""),
}
META: dict[str, tuple[Any, ...]] = {
    "ranks": ("x", [[[0.5]]], [[["a"]]], [[[-1]]], 7, {}),
    "num_gpus": (0, "3", 10**9),
    "gpus_per_node": (0, "x"),
    "batching": ("loose", 7),
    "base_precision": ("fp4", 4),
    "buckets": ("x", [0], [-1], [1.5]),
    "expected_batch": (7, ["a"]),
    "step_time_s": (-1, "fast", float("nan")),
    "gap": (-0.1, "none"),
    "homogeneous": (7, {"plan": 7}, {"plan": [{}]}, {"step_time_s": 0}),
    "time_profile": (7, {"file": 7}),
}
TEXTS = {
    "empty": ("", "want an object"),
    "list": ("[1, 2]", "want an object"),
    "no-entries": ("strategy_config: []", "a list that is not empty"),
    "entry-no-object": ("strategy_config: [7]", "want an object"),
    "stranger": ("strategy_config: [{dp: 1, tp: 1, pp: 1, max_tokens: 8, sp: 1}]", "sp"),
    "missing": ("strategy_config: [{dp: 1}]", "is missing"),
    "unclosed": ("strategy_config: [{dp: 1", "not valid YAML"),
    "latin": (b"strategy_config: \xe9", "not UTF-8"),
    "many-small": (
        "strategy_config: [" + ", ".join(["{dp: 10000, tp: 1, pp: 1, max_tokens: 8}"] * 2) + "]",
        "need 20,000 GPUs",
    ),
}


def _plan(entry: Any, meta: Any = None) -> str:
    content = {"strategy_config": [entry], **({"meta": meta} if meta else {})}
    return yaml.safe_dump(content)


def _cases() -> dict[str, Case]:
    cases = {}
    for field, values in WRONG.items():
        for number, value in enumerate(values):
            says = ("plan.yaml: strategy_config[0]", field)
            text = _plan({**_ENTRY, field: value})
            cases[f"{field}-{number}"] = Case(says, {"plan.yaml": text}, command="simulate")
    for field, values in META.items():
        for number, value in enumerate(values):
            says = (f"plan.yaml: meta.{field}", "want")
            text = _plan(_ENTRY, {field: value})
            cases[f"meta-{field}-{number}"] = Case(says, {"plan.yaml": text}, command="simulate")
    for name, (content, said) in TEXTS.items():
        cases[name] = Case(("plan.yaml: ", said), {"plan.yaml": content}, command="simulate")
    return cases


CASES = _cases() | {
    "pipe": Case(("plan.yaml", "no regular file"), {"plan.yaml": None}, command="simulate"),
    "nowhere": Case(("none.yaml: no such plan",), None, ("--strategy-config", "none"), "simulate"),
    "long-name": Case(
        ("no such plan", "make it with"), None, ("--strategy-config", "x" * 5000), "simulate"
    ),
    "folder": Case(
        ("no regular file",), {"folder.yaml/x": ""}, ("--strategy-config", "folder.yaml")
    ),
    "heads": Case(
        ("plan.yaml: <3,1>", "does not divide"), {"plan.yaml": _plan({**_ENTRY, "tp": 3})}
    ),
    "stages": Case(
        ("plan.yaml: <1,99>", "more than the"), {"plan.yaml": _plan({**_ENTRY, "pp": 99})}
    ),
    "ranks-twice": Case(
        ("plan.yaml: ", "rank"),
        {"plan.yaml": _plan({**_ENTRY, "dp": 2}, {"ranks": [[[0]], [[0]]]})},
    ),
    "ranks-missing": Case(
        ("plan.yaml: ", "rank"), {"plan.yaml": _plan({**_ENTRY, "dp": 2}, {"ranks": [[[0]]]})}
    ),
    "small-micro-batches": Case(
        ("task[0].context_length = 64", "largest max_tokens 4", "or plan for the longer length"),
        {"plan.yaml": _plan({**_ENTRY, "max_tokens": 4})},
    ),
}
