"""Task files: values, contradictions, and texts that are no task file."""

from __future__ import annotations

from typing import Any

from tests.bad_inputs.case import TASKS, Case, task_file

HUGE = 10**300
#: Of each field, values that are none of it.
WRONG: dict[str, tuple[Any, ...]] = {
    "rank": (0, -1, 1.5, "8", True, [8], 10**9, HUGE),
    "lora_alpha": (0, "16", float("nan"), float("inf"), 1e30, HUGE, {}),
    "target_modules": ([], "q", ["q_proj", "x"], 7, {}, [["q_proj"]], [None]),
    "global_batch_size": (0, 2.5, 10**12, HUGE, "4", False),
    "dataset_name": ("", 7, [], [""], {}, [7], " "),
    "context_length": (0, -64, 10**12, "64", 1e3),
    "json_key": ("", 7, ["text"]),
    "max_samples": (0, -1, 2.0, HUGE),
    "steps": (0, -5, 1.5, "3", 10**18),
    "epochs": (0, 0.5, 10**9, HUGE),
    "learning_rate": (0, -1e-4, 1e38, float("nan"), "1e-4x", True, HUGE),
    "weight_decay": (1e308, -0.1, float("inf"), 1e6, "0"),
    "loraplus_ratio": (1e308, 0, "16"),
    "rank_pattern": ({"(.*)*(.*)*x": 3}, {"(": 3}, {"q_proj": 0}, {".?" * 30 + "x": 3}, 7),
    "alpha_pattern": ({"q_proj": 1e308}, {"q_proj": -1}),
    "lr_scheduler": ("cosin", 7, ["linear"], ""),
    "warmup_steps": (-1, 1.5, HUGE, 10**12),
    "max_grad_norm": (-1, float("nan"), "one"),
    "lora_dropout": (1, 0.9999999999999999, -0.1, 1.5, float("nan"), "0.1"),
    "seed": (-1, 1.5, 2**64, HUGE),
    "prompt": (7, "{instruction", "{nothing}", ""),
    "train_on_inputs": (1, "yes", 0.0),
    "validation_split": (1, -0.5, "0.1"),
    "early_stopping_patience": (-1, 1.5, HUGE),
    "early_stopping_min_delta": (-1, float("nan")),
    "resume_from": ("", 7, ["x"]),
    "objective": ("ppo2", 7),
    "offload": (1, "yes"),
    "name": ("", "a/b", "..", ".hidden", "x" * 101, 7, "a b", "a\nb"),
}

TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "line 1, column 1: not valid JSON"),
    "cut": ('{"task": [', "not valid JSON"),
    "list": ("[1]", "want an object"),
    "null": ("null", "want an object"),
    "number": ("7", "want an object"),
    "text": ('"task"', "want an object"),
    "latin": ('{"task": "é"}'.encode("latin-1"), "not UTF-8 text"),
    "utf-16": ('{"task": []}'.encode("utf-16"), "not UTF-8 text"),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep-enough": ('{"task": ' + "[" * 70 + "]" * 70 + "}", "nested too deeply"),
    "digits": ('{"task": ' + "9" * 5000 + "}", "an integer of 5000 digits"),
    "twice": ('{"task": [], "task": []}', "'task' is given twice"),
    "no-task": ("{}", "task: is missing"),
    "no-tasks": ('{"task": []}', "a list that is not empty"),
    "entry": ('{"task": [7]}', "task[0] = 7: want an object"),
    "stranger": ('{"task": [{}], "tasks": 1}', "tasks"),
    "too-few": ('{"train_task_num": 9, "task": [{}]}', "lists only 1"),
    "too-many": ('{"task": [' + "{}, " * 3000 + "{}]}", "lists 3001 tasks, want at most 3000"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00.", "not UTF-8 text"),
    "zeros": (b"\x00" * 64, "not valid JSON"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00", "not UTF-8 text"),
}
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML_TEXTS: dict[str, tuple[str, str]] = {
    "bomb": (_BOMB, "too large"),
    "merge-bomb": (_BOMB + "task: {<<: [" + ", ".join(["*i"] * 9) + "]}\n", "too large"),
    "cycle": ("task: &x\n  - *x\n", "an alias of what it is in"),
    "date": ("task: [{rank: 2026-13-45}]\n", 'rank = "2026-13-45"'),
    "timestamp": ("task: [{rank: 2026-11-26T12:00:00}]\n", "rank ="),
    "python": ("task: !!python/object/apply:os.getcwd []\n", "line 1, column 7"),
    "binary": ("task: !!binary aGVsbG8=\n", "the tag '!!binary' is not allowed"),
    "set": ("task: !!set {a, b}\n", "the tag '!!set' is not allowed"),
    "omap": ("task: !!omap [a: 1]\n", "is not allowed"),
    "own-tag": ("task: !mine 7\n", "the tag '!mine' is not allowed"),
    "int-of-text": ("task: !!int many\n", "line 1, column 7"),
    "bool-of-text": ("task: !!bool perhaps\n", "line 1, column 7"),
    "float-of-text": ("task: !!float many\n", "line 1, column 7"),
    "digits": ("task: " + "9" * 5000 + "\n", "line 1, column 7"),
    "empty-hex": ("task: 0x_\n", "line 1, column 7"),
    "huge-hex": ("task: 0x" + "f" * 10_000 + "\n", "line 1, column 7"),
    "base-60": ("task: " + ":".join(["59"] * 5000) + "\n", "line 1, column 7"),
    "deep": ("task: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep-enough": ("task: " + "[" * 70 + "]" * 70, "want at most 64 levels"),
    "list-key": ("? [a, b]\n: 1\n", "line 1"),
    "two": ("task: []\n---\ntask: []\n", "line 2"),
    "tab": ("task:\n\t- a\n", "line 2"),
    "twice": ("task: []\ntask: []\n", "line 2: the field 'task' is given twice"),
    "control": ("task: \x07\n", "U+0007"),
    "anchor": ("task: *nowhere\n", "line 1, column 7"),
    "long": ("# " + "x" * (1 << 22), "too large"),
    "many": ("task: [" + "1," * 100_001 + "]", "too large"),
}


def _cases() -> dict[str, Case]:
    cases = {}
    for field, values in WRONG.items():
        for number, value in enumerate(values):
            says = ("tasks.json: task[1].", field, "" if field == "prompt" else "want")
            content = task_file(**{field: value})
            cases[f"{field}-{number}"] = Case(says, {"tasks.json": content}, command="plan")
    for name, (text, says) in TEXTS.items():
        cases[f"json-{name}"] = Case(("tasks.json: ", says), {"tasks.json": text}, command="plan")
    for name, (text, says) in YAML_TEXTS.items():
        options = ("--trainer-config", "tasks.yaml")
        files = {"tasks.yaml": text}
        cases[f"yaml-{name}"] = Case(("tasks.yaml: ", says), files, options, "plan")
    return cases


CASES = _cases() | {
    "pipe": Case(("no trainer configuration", "tasks.json"), {"tasks.json": None}, command="plan"),
    "long-name": Case(
        ("no trainer configuration",), None, ("--trainer-config", "x" * 5000), "plan"
    ),
    "decay-turns-weights": Case(
        ("task[1].weight_decay = 5", "want at most 1 ", "learning_rate"),
        {"tasks.json": task_file(learning_rate=1, weight_decay=5)},
        command="plan",
    ),
    "warm-up-beyond-steps": Case(
        ("task[1].warmup_steps = 9", "at most the task's steps, 3"),
        {"tasks.json": task_file(steps=3, warmup_steps=9)},
        command="plan",
    ),
    "endless": Case(
        ("task[1].steps", "want at least one"),
        {"tasks.json": task_file(epochs=...)},
        command="plan",
    ),
    "same-names": Case(
        ("task[1].name", "has this name already"),
        {"tasks.json": task_file(name="Everything")},
        command="plan",
    ),
    "field-of-a-megabyte": Case(
        ("task[1].", "is no field here"),
        {"tasks.json": task_file(**{"y" * 10**6: 1})},
        command="plan",
    ),
    "value-of-a-megabyte": Case(
        ("task[1].lr_scheduler", "want one of"),
        {"tasks.json": task_file(lr_scheduler="z" * 10**6)},
        command="plan",
    ),
    "that-a-terminal-obeys": Case(
        ("task[1].", "is no field here"),
        {"tasks.json": task_file(**{"\x1b[2J": 1})},
        command="plan",
    ),
    "a-thousand-empty-tasks": Case(
        ("7000 problems", "more:"), {"tasks.json": {"task": [{}] * 1000}}, command="plan"
    ),
    "rank-beyond-the-model": Case(
        ("task[1].rank = 5000: want at most",), {"tasks.json": task_file(rank=5000)}
    ),
    "fields-of-another-tool": Case(
        ("task[1].", "lora_r"), {"tasks.json": task_file(lora_r=8)}, command="plan"
    ),
    "more-tasks-than-listed": Case(
        ("lists only 2",), {"tasks.json": {**TASKS, "train_task_num": 3}}, command="plan"
    ),
}
