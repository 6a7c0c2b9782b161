"""Data files: JSON lines, arrays, CSV, parquet, and what is none of them."""

from __future__ import annotations

from tests.bad_inputs.case import Case, task_file

GOOD = '{"input_ids": [5, 6, 7]}\n'
#: Of a file of JSON lines, the second line.
LINES: dict[str, tuple[str | bytes, str]] = {
    "word": ("hello", "line 2, column 1: not valid JSON"),
    "list": ("[1]", "line 2: is [1], want an object"),
    "number": ("7", "line 2: is 7, want an object"),
    "cut": ('{"input_ids": [1,', "line 2, column"),
    "latin": ('{"text": "é"}'.encode("latin-1"), "line 2: not UTF-8 text"),
    "deep": ("[" * 100_000, "line 2: nested too deeply"),
    "digits": ('{"input_ids": [' + "9" * 5000 + "]}", "line 2: "),
    "negative": ('{"input_ids": [1, -5]}', "line 2: input_ids[1]"),
    "token-text": ('{"input_ids": ["a", 1]}', "line 2: input_ids[0]"),
    "token-flag": ('{"input_ids": [true, 1]}', "line 2: input_ids[0]"),
    "token-float": ('{"input_ids": [1.5, 1]}', "line 2: input_ids[0]"),
    "token-beyond": ('{"input_ids": [1, 99999]}', "line 2: input_ids[1]"),
    "token-huge": ('{"input_ids": [1, 99999999999999999999]}', "line 2: input_ids[1]"),
    "tokens-text": ('{"input_ids": "1 2"}', "line 2: input_ids"),
    "labels-short": ('{"input_ids": [1, 2], "labels": [1]}', "line 2: labels"),
    "labels-other": ('{"input_ids": [1, 2], "labels": [1, 7]}', "line 2: labels[1]"),
    "other-format": ('{"text": "hello"}', "line 2: input_ids: is missing"),
    "empty-object": ("{}", "line 2: input_ids: is missing"),
    "null": ("null", "line 2: is null, want an object"),
}
FILES: dict[str, tuple[str | bytes, str]] = {
    "no-rows.jsonl": ("\n\n", "has no rows"),
    "utf-16.jsonl": (GOOD.encode("utf-16"), "is no format that is read here"),
    "gzip.jsonl": (b"\x1f\x8b\x08\x00", "is no format that is read here"),
    "zip.jsonl": (b"PK\x03\x04rest", "is no format that is read here"),
    "pickle.pkl": (b"\x80\x04.", "is no format that is read here"),
    "tabs.tsv": ("a\tb\n", "is no format that is read here"),
    "parquet.jsonl": (b"PAR1rest", "is no format that is read here"),
    "no-parquet.parquet": ("hello", "cannot be read as parquet"),
    "cut-parquet.parquet": (b"PAR1\x15\x04PAR1", "cannot be read as parquet"),
    "array.json": ('[{"input_ids": [1, 2]}, 7]', "row 2: is 7, want an object"),
    "array-cut.json": ('[{"input_ids": [1, 2]}', "not valid JSON"),
    "array-deep.json": ("[" * 100_000, "nested too deeply"),
    "array-digits.json": ("[" + "9" * 5000 + "]", "an integer of 5000 digits"),
    "array-empty.json": ("[]", "has no rows"),
    "array-latin.json": (b'[{"text": "\xe9"}]', "not UTF-8 text"),
    "spread.json": ('{\n "input_ids": [1, 2]\n}\n', "one JSON object over several lines"),
    "semicolons.csv": ("instruction;output\na;b\n", "want commas"),
    "cells.csv": ("instruction,output\na,b,c\n", "has 3 cells, the header 2"),
    "twice.csv": ("text,text\na,b\n", "more than once"),
    "quote.csv": ('text\n"a\n', "cannot be read as CSV"),
    "latin.csv": (b"text\n\xe9\n", "save it as UTF-8"),
    "lists.csv": ("input_ids\n[1\n", "not valid JSON in a column of lists"),
    "header.csv": ("text\n", "has no rows"),
    "empty.csv": ("", "has no rows"),
    "roles.jsonl": ('{"messages": [{"role": "x", "content": "y"}]}\n', "line 1: messages"),
    "no-messages.jsonl": ('{"messages": []}\n', "has anything to learn"),
    "messages-text.jsonl": ('{"messages": "hello"}\n', "line 1: messages"),
    "message-no-object.jsonl": ('{"messages": [7]}\n', "line 1: messages[0]"),
    "no-output.jsonl": ('{"instruction": "a"}\n', "line 1"),
    "output-number.jsonl": ('{"instruction": "a", "output": 7}\n', "line 1: output"),
    "strange-fields.jsonl": ('{"colour": "red"}\n', "line 1"),
    "nothing-to-learn.jsonl": (
        '{"input_ids": [1, 2], "labels": [-100, -100]}\n', "has anything to learn",
    ),
    "endless.jsonl": ('{"text": "' + "a" * 1_100_000 + '"}\n', "line 1: its text has 11"),
}  # fmt: skip


def _cases() -> dict[str, Case]:
    cases = {}
    for name, (line, says) in LINES.items():
        content = GOOD.encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n"
        where = "tasks.json: task[1].dataset_name = 'short': data/short.jsonl: "
        cases[f"line-{name}"] = Case((where, says), {"data/short.jsonl": content})
    for name, (content, says) in FILES.items():
        files = {f"data/{name}": content, "tasks.json": task_file(dataset_name=f"data/{name}")}
        cases[name] = Case((f"task[1].dataset_name = 'data/{name}': data/{name}: ", says), files)
    return cases


CASES = _cases() | {
    "pipe": Case(("task[1].dataset_name", "no such data set"), {"data/short.jsonl": None}),
    "nowhere": Case(
        ("task[1].dataset_name = 'none': no such data set", "put the file there"),
        {"tasks.json": task_file(dataset_name="none")},
    ),
    "folder": Case(
        ("task[1].dataset_name = 'base'", "is a folder, want a file"),
        {"tasks.json": task_file(dataset_name="base")},
    ),
    "long-name": Case(
        ("task[1].dataset_name", "no such data set"),
        {"tasks.json": task_file(dataset_name="x" * 5000)},
    ),
    "null-in-name": Case(
        ("task[1].dataset_name", "no such data set"),
        {"tasks.json": task_file(dataset_name="a\0b")},
    ),
    "outside": Case(
        ("task[1].dataset_name = ...: no such data set in inside (--confine)",),
        {"inside/x": "", "tasks.json": task_file(dataset_name="/etc/passwd")},
        ("--confine", "inside"),
    ),
    "outside-by-dots": Case(
        ("task[1].dataset_name = ...: no such data set in data (--confine)",),
        {"secret.jsonl": GOOD, "tasks.json": task_file(dataset_name="data/../secret.jsonl")},
        ("--confine", "data"),
    ),
    "start-outside": Case(
        ("task[1].resume_from = ...: is not in data (--confine)",),
        {"tasks.json": task_file(resume_from="start/few")},
        ("--confine", "data"),
    ),
    "values-are-not-told": Case(
        ("task[1].dataset_name = ...: data/short.jsonl: line 2",),
        {"data/short.jsonl": GOOD + '{"input_ids": "my secret"}\n'},
        ("--confine", "."),
    ),
    "no-task-is-left": Case(
        ("task[0].rank = 0", "task[1].rank = 0"),
        {"tasks.json": {"task": [{"rank": 0}, {"rank": 0}]}},
        ("--skip-bad-tasks",),
    ),
}
