from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import ConfigError
from tasks.prompts import ALPACA, PLAIN
from tasks.rows import Row, TextRow, TokenRow, read_rows
from tests.tasks.support import write_rows


def read(
    folder: Path, *rows: Any, prompt: str = "auto", json_key: str = "text", vocab_size: int = 300
) -> list[Row]:
    path = write_rows(folder, *rows)
    return read_rows(path, prompt=prompt, json_key=json_key, vocab_size=vocab_size)


def problems_of(folder: Path, *rows: Any, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, *rows, **settings)
    prefix = f"{folder / 'rows.jsonl'}: "
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


ALPACA_ROW = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT_ROW = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "ciao"},
        {"role": "user", "content": "never answered"},
    ]
}


def test_instructions(tmp_path: Path) -> None:
    bare = {"instruction": "Go.", "output": "Gone."}
    rows = read(tmp_path, ALPACA_ROW, bare, bare | {"input": None})
    assert rows[0] == TextRow((ALPACA.render("Add.", "1 2", "3"),))
    assert rows[1] == rows[2] == TextRow((ALPACA.render("Go.", "", "Gone."),))
    assert read(tmp_path, bare, prompt="plain") == [TextRow((PLAIN.render("Go.", "", "Gone."),))]
    custom = read(tmp_path, ALPACA_ROW, prompt="Q {instruction}{input} A {output}.")
    assert custom == [TextRow((("Q Add.1 2 A ", "3."),))]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "answer": "A"},
        {"query": "Q", "response": "A"},
        {"problem": "Q", "solution": "A"},
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Q", "prompt": "all of it", "output": "A"},
    ],
)
def test_fields_under_their_other_names(tmp_path: Path, row: dict[str, str]) -> None:
    assert read(tmp_path, row) == [TextRow((ALPACA.render("Q", "", "A"),))]


def test_conversations(tmp_path: Path) -> None:
    expected = TextRow(
        (
            ("<|system|>\nBe kind.\n<|user|>\nhi\n<|assistant|>\n", "hello"),
            ("<|user|>\nbye\n<|assistant|>\n", "ciao"),
        )
    )
    assert read(tmp_path, CHAT_ROW) == read(tmp_path, CHAT_ROW, prompt="chat") == [expected]
    as_chat = read(tmp_path, ALPACA_ROW, prompt="chat")
    assert as_chat == [TextRow((("<|user|>\nAdd.\n\n1 2\n<|assistant|>\n", "3"),))]


def test_plain_text(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "abc"}) == [TextRow((("", "abc"),))]
    other = ALPACA_ROW | {"content": "abc"}
    assert read(tmp_path, other, json_key="content") == [TextRow((("", "abc"),))]
    assert read(tmp_path, ALPACA_ROW | {"text": "all"}) == read(tmp_path, ALPACA_ROW)


def test_tokenised_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, {"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [7]})
    assert rows == [TokenRow([1, 2], [-100, 2]), TokenRow([7], [7])]


@pytest.mark.parametrize(
    "row",
    [
        ALPACA_ROW | {"output": "  \n"},
        {"text": " "},
        {"messages": []},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"messages": [{"role": "assistant", "content": " "}]},
    ],
)
def test_rows_without_anything_to_learn_have_no_turns(tmp_path: Path, row: Any) -> None:
    assert read(tmp_path, row) == [TextRow(())]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    rows = read_rows(path, prompt="auto", json_key="text", vocab_size=9)
    assert len(rows) == 2


def test_mistakes_name_their_line_and_field(tmp_path: Path) -> None:
    problems = problems_of(
        tmp_path,
        ALPACA_ROW,
        '{"instruction": "a", "output": }',
        "[1]",
        {"instruction": "a"},
        "",
        {"instruction": 3, "output": "x"},
        {"instruction": "a", "input": ["b"], "output": "x"},
        '{"instruction": "\\ud800", "output": "x"}',
        "[" * 100_000,
    )
    for problem, (line, field) in zip(
        problems,
        [
            (2, "not valid JSON"),
            (3, "want an object"),
            (4, "output: is missing"),
            (6, "instruction = 3"),
            (7, "input = "),
            (8, "instruction: character 0"),
            (9, "nested too deeply"),
        ],
        strict=True,
    ):
        assert problem.startswith(f"line {line}") and field in problem


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"input_ids": "12"}, "input_ids"),
        ({"input_ids": None}, "input_ids"),
        ({"input_ids": [300]}, "input_ids[0]"),
        ({"input_ids": [-1]}, "input_ids[0]"),
        ({"input_ids": [True]}, "input_ids[0]"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: are 1"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels[0] = 2: want 1"),
        ({"input_ids": [1], "labels": [-1]}, "labels[0]"),
        ({"input_ids": [1], "labels": {"a": 1}}, "labels"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"article": "x"}, "none of the known formats"),
        ({}, "none of the known formats"),
    ],
)
def test_a_wrong_row_is_one_problem(tmp_path: Path, row: Any, field: str) -> None:
    (problem,) = problems_of(tmp_path, row)
    assert problem.startswith("line 1: ") and field in problem


def test_many_mistakes_end_with_a_count(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, ALPACA_ROW, *[{"instruction": "a"}] * 50)
    assert len(problems) == 21 and "30 more" in problems[-1]


def test_the_last_line_may_lack_its_end_and_a_cut_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(ConfigError, match="line 2, column"):
        read_rows(path, prompt="auto", json_key="text", vocab_size=9)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        read_rows(path, prompt="auto", json_key="text", vocab_size=9)


def test_an_indented_document_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([ALPACA_ROW], indent=1))
    with pytest.raises(ConfigError, match="want one object per line"):
        read_rows(path, prompt="auto", json_key="text", vocab_size=9)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == ["has no rows, want one JSON object per line"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"input_ids": [1]}, "alpaca"),
        (CHAT_ROW, "plain"),
        ({"text": "a"}, "chat"),
        ({"text": "a"}, "{instruction}"),
    ],
)
def test_a_prompt_that_does_not_go_with_the_data(tmp_path: Path, row: Any, prompt: str) -> None:
    (problem,) = problems_of(tmp_path, row, prompt=prompt)
    assert problem.startswith("prompt = ") and "want" in problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    ["instruction", "input", "output", "messages", "text", "input_ids", "labels"]
)


@given(st.lists(st.dictionaries(keys, json_values, max_size=4) | json_values, max_size=4))
@settings(deadline=None, max_examples=200)
def test_any_json_is_read_or_refused_with_a_place(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        found = read_rows(path, prompt="auto", json_key="text", vocab_size=300)
    except ConfigError as error:
        assert all(problem.startswith(f"{path}: ") for problem in error.problems)
    else:
        assert len(found) == len(rows)
