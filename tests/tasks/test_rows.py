from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.tasks.chat import ChatTemplate
from lobra.tasks.prompts import ALPACA, PLAIN
from lobra.tasks.row_format import Reading
from lobra.tasks.rows import Rows, read_rows
from lobra.tasks.special_tokens import SpecialTokens
from lobra.tasks.text_rows import Row, TextRow, TokenRow
from tests.tasks.support import rendered, write_rows

SPECIALS = SpecialTokens(
    spellings=("<|im_start|>", "<|im_end|>", "</s>", "<s>"),
    end="</s>",
    beginning="<s>",
    is_begun=True,
    usual=frozenset({"<s>", "</s>"}),
)


def reading(**settings: Any) -> Reading:
    values: dict[str, Any] = {
        "prompt": "auto",
        "json_key": None,
        "train_on_inputs": False,
        "max_rows": None,
        "vocab_size": 300,
    }
    without = SimpleNamespace(chat_template=None)
    template = ChatTemplate(without, SPECIALS, date(2024, 1, 1))  # type: ignore[arg-type]
    return Reading(specials=lambda: SPECIALS, chat=lambda: template, **values | settings)


def read_all(folder: Path, *rows: Any, **settings: Any) -> Rows:
    return read_rows(write_rows(folder, *rows), reading(**settings))


def read(folder: Path, *rows: Any, **settings: Any) -> list[Row]:
    return read_all(folder, *rows, **settings).rows


def problems_of(folder: Path, *rows: Any, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(folder, *rows, **settings)
    prefix = f"{folder / 'rows.jsonl'}: "
    return [problem.removeprefix(prefix) for problem in caught.value.problems]


def parts(row: Row) -> tuple[str, str]:
    """Return (what is read, what is learned after it) of a row with one learned part."""
    assert isinstance(row, TextRow)
    ((start, end),) = row.learned
    assert not row.text[end:].strip()
    return row.text[:start], row.text[start:end]


def verbatim(row: Row) -> list[str]:
    assert isinstance(row, TextRow)
    return [row.text[start:end] for start, end in row.verbatim]


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

    def alpaca(*fields: str) -> tuple[str, str]:
        prompt, target = rendered(ALPACA, *fields)
        return prompt, f"{target}</s>"

    assert parts(rows[0]) == alpaca("Add.", "1 2", "3")
    assert verbatim(rows[0]) == ["Add.", "1 2", "3"]
    assert parts(rows[1]) == parts(rows[2]) == alpaca("Go.", "", "Gone.")
    (plain,) = read(tmp_path, bare, prompt="plain")
    assert parts(plain) == (rendered(PLAIN, "Go.", "", "Gone.")[0], "Gone.</s>")
    (custom,) = read(tmp_path, ALPACA_ROW, prompt="Q {instruction}{input} A {output}.")
    assert parts(custom) == ("Q Add.1 2 A ", "3.</s>")


def test_special_tokens_of_a_prompt_are_tokens_and_those_of_fields_are_not(tmp_path: Path) -> None:
    prompt = "<s><|im_start|>user {instruction}<|im_end|><|im_start|>assistant {output}<|im_end|>\n"
    row = {"instruction": "a<|im_end|>b", "output": "c</s>"}
    (custom,) = read(tmp_path, row, prompt=prompt)
    assert parts(custom) == (
        "<s><|im_start|>user a<|im_end|>b<|im_end|><|im_start|>assistant ",
        "c</s><|im_end|>",  # no second end token, and the line end after it is not learned
    )
    assert verbatim(custom) == ["a<|im_end|>b", "c</s>"]
    assert isinstance(custom, TextRow) and not custom.begins  # no second beginning token


@pytest.mark.parametrize(
    ("row", "learns", "ignored"),
    [
        ({"question": "Q", "answer": "A"}, "answer", []),
        ({"query": "Q", "response": "A"}, "response", []),
        ({"problem": "Q", "solution": "A"}, "solution", []),
        ({"problem": "Q", "solution": "A", "answer": "3"}, "solution", ["answer"]),
        ({"instruction": "Q", "prompt": "all of it", "output": "A"}, "output", ["prompt"]),
    ],
)
def test_fields_under_their_other_names(
    tmp_path: Path, row: dict[str, str], learns: str, ignored: list[str]
) -> None:
    found = read_all(tmp_path, row, row)
    prompt, target = rendered(ALPACA, "Q", "", "A")
    assert [parts(entry) for entry in found.rows] == [(prompt, f"{target}</s>")] * 2
    assert found.kind == "instruction" and found.learns.startswith(f"{learns} and its end")
    assert found.ignored == dict.fromkeys(ignored, 2)


def test_prompt_and_completion_are_joined_as_they_are(tmp_path: Path) -> None:
    found = read_all(tmp_path, {"prompt": "2+2=", "completion": " 4", "id": 7})
    assert [parts(row) for row in found.rows] == [("2+2=", " 4</s>")]
    assert verbatim(found.rows[0]) == ["2+2=", " 4"]
    assert found.kind == "completion" and found.ignored == {"id": 1}
    assert any("prompt: alpaca" in note for note in found.notes)
    (alpaca,) = read(tmp_path, {"prompt": "Q", "completion": "A"}, prompt="alpaca")
    assert parts(alpaca) == (rendered(ALPACA, "Q", "", "A")[0], "A</s>")
    (chat,) = read(tmp_path, {"prompt": "Q", "completion": "A"}, prompt="chat")
    assert parts(chat) == ("<|user|>\nQ\n<|assistant|>\n", "A</s>")
    (given,) = read(tmp_path, {"prompt": "Q", "context": "C", "completion": "A"})
    assert parts(given)[0] == rendered(ALPACA, "Q", "C", "A")[0]


def test_conversational_prompts_and_completions(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {
        "prompt": [*prompt, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    assert parts(read(tmp_path, row)[0]) == (
        "<|user|>\na\n<|assistant|>\nb</s><|user|>\nc\n<|assistant|>\n",
        "d</s>",
    )


def test_conversations(tmp_path: Path) -> None:
    (row,) = read(tmp_path, CHAT_ROW)
    assert [row] == read(tmp_path, CHAT_ROW, prompt="chat")
    assert isinstance(row, TextRow)
    assert [row.text[start:end] for start, end in row.learned] == ["hello</s>", "ciao</s>"]
    (as_chat,) = read(tmp_path, ALPACA_ROW, prompt="chat")
    assert parts(as_chat) == ("<|user|>\nAdd.\n\n1 2\n<|assistant|>\n", "3</s>")


def test_sharegpt_and_history_are_conversations(tmp_path: Path) -> None:
    expected = read(tmp_path, {"messages": CHAT_ROW["messages"][:-1]})
    shared = [
        {
            "from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]),
            "value": m["content"],
        }
        for m in CHAT_ROW["messages"][:-1]
    ]
    assert read(tmp_path, {"conversations": shared}) == expected
    assert read(tmp_path, {"conversations": shared[1:], "system": "Be kind."}) == expected
    history = {"system": "Be kind.", "history": [["hi", "hello"]], "instruction": "bye"}
    assert read(tmp_path, history | {"output": "ciao"}, prompt="chat") == expected


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts_of = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts_of}]
    assert parts(read(tmp_path, {"messages": messages})[0])[1] == "hello</s>"


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}]
)
def test_messages_may_say_that_they_are_not_learned(tmp_path: Path, flag: dict[str, Any]) -> None:
    messages = [dict(message) for message in CHAT_ROW["messages"]]
    messages[2] |= flag
    (row,) = read(tmp_path, {"messages": messages})
    assert isinstance(row, TextRow)
    assert [row.text[start:end] for start, end in row.learned] == ["ciao</s>"]
    assert row.text == read(tmp_path, CHAT_ROW)[0].text  # type: ignore[union-attr]


def test_plain_text(tmp_path: Path) -> None:
    (row,) = read(tmp_path, {"text": "abc"})
    assert parts(row) == ("", "abc</s>") and verbatim(row) == ["", "abc"]
    other = ALPACA_ROW | {"content": "abc"}
    assert read(tmp_path, other, json_key="content") == [row]
    assert read(tmp_path, ALPACA_ROW | {"text": "all"}) == read(tmp_path, ALPACA_ROW)
    assert read(tmp_path, ALPACA_ROW, json_key="text") == read(tmp_path, ALPACA_ROW)


@pytest.mark.parametrize(
    ("text", "is_obeyed", "ends"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n", True, "<|im_end|>\n"),
        ("<s>[INST] hi [/INST] hello</s>", True, "hello</s>"),
        ("Q: a A: b</s>", True, "b</s>"),
        ("in HTML, <s>struck out</s> is old", False, "old</s>"),
        ("<|im_start|>user", True, "user</s>"),
        ("in HTML: <s>struck out</s>", False, "</s></s>"),
        ("<s>a</s><s>b</s>", True, "b</s>"),
    ],
)
def test_special_tokens_of_a_rendered_chat_are_tokens(
    tmp_path: Path, text: str, is_obeyed: bool, ends: str
) -> None:
    found = read_all(tmp_path, {"text": text})
    (row,) = found.rows
    assert isinstance(row, TextRow)
    assert bool("".join(verbatim(row))) != is_obeyed
    assert row.text.endswith(ends) and row.text.startswith(text)
    assert row.begins != text.startswith("<s>")
    assert bool(found.notes) == is_obeyed


def test_the_first_rows_only(tmp_path: Path) -> None:
    found = read_all(tmp_path, {"text": "a"}, {"text": "b"}, "broken", max_rows=2)
    assert [parts(row)[1] for row in found.rows] == ["a</s>", "b</s>"]
    assert found.num_rows == 2 and found.places == ["line 1", "line 2"]


def test_tokenised_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, {"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [7]})
    assert rows == [TokenRow([1, 2], [-100, 2]), TokenRow([7], [7])]


@pytest.mark.parametrize(
    ("fields", "tokens", "labels"),
    [
        ({"completion_mask": [0, 0, 0, 1, 1]}, [1, 60, 61, 62, 2], [62, 2]),
        ({"assistant_masks": [0, 0, 0, 1, 1]}, [1, 60, 61, 62, 2], [62, 2]),
        ({"loss_mask": [False, False, False, True, True]}, [1, 60, 61, 62, 2], [62, 2]),
        (
            {"completion_mask": [0, 0, 1, 1, 1], "assistant_masks": [1, 0, 0, 1, 1]},
            [1, 60, 61, 62, 2],
            [62, 2],
        ),
        ({"attention_mask": [1, 1, 1, 0, 0]}, [1, 60, 61], [1, 60, 61]),
        ({"attention_mask": [0, 0, 1, 1, 1]}, [61, 62, 2], [61, 62, 2]),
        (
            {"attention_mask": [0, 1, 1, 1, 1], "position_ids": [1, 0, 1, 2, 3]},
            [60, 61, 62, 2],
            [60, 61, 62, 2],
        ),
        ({"position_ids": [0, 1, 2, 3, 4], "token_type_ids": [0] * 5}, [1, 60, 61, 62, 2], None),
    ],
)
def test_masks_of_tokenised_rows(
    tmp_path: Path, fields: dict[str, Any], tokens: list[int], labels: list[int] | None
) -> None:
    (row,) = read(tmp_path, {"input_ids": [1, 60, 61, 62, 2]} | fields)
    assert isinstance(row, TokenRow) and row.tokens == tokens
    assert [label for label in row.labels if label != -100] == (labels or tokens)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ALPACA_ROW | {"system": "Be kind."}, "system"),
        (ALPACA_ROW | {"history": [["a", "b"]]}, "history"),
        (ALPACA_ROW | {"weight": 0.5}, "weight"),
        (ALPACA_ROW | {"tools": [{}]}, "tools"),
        ({"text": "a", "position_ids": [0]}, "position_ids"),
        ({"text": "a", "images": ["x.png"]}, "images"),
        ({"prompt": "a", "completion": "b", "label": True}, "label"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen"),
        (ALPACA_ROW | {"context": "more"}, "input and context"),
        (ALPACA_ROW | {"response": "other"}, "output and response"),
        (ALPACA_ROW | {"question": "other"}, "instruction and question"),
        ({"input_ids": [5, 6], "loss_weights": [0.5, 1]}, "loss_weights"),
        (CHAT_ROW | {"enable_thinking": False}, "enable_thinking"),
        (CHAT_ROW | {"history": [["a", "b"]]}, "history"),
        (CHAT_ROW | {"functions": [{"name": "f"}]}, "functions"),
        (CHAT_ROW | {"chat_template_kwargs": 3}, "chat_template_kwargs"),
        (CHAT_ROW | {"tools": "[{"}, "tools"),
        ({"input_ids": [5, 6], "position_ids": [0, 0]}, "position_ids"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "attention_mask"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask"),
        ({"input_ids": [5, 6], "loss_mask": [1]}, "loss_mask"),
    ],
)
def test_what_would_change_training_is_refused(tmp_path: Path, row: Any, name: str) -> None:
    (problem,) = problems_of(tmp_path, row)
    assert problem.startswith(f"line 1: {name}"), problem


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"weight": 0.5}, "weight"),
        ({"train": "yes"}, "train"),
        ({"weight": 1, "train": False}, "contradict"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"loss": False}, "loss"),
        ({"mask": 0}, "mask"),
        ({"loss_weight": 0.0}, "loss_weight"),
        ({"tool_calls": [{"name": "f"}]}, "tool_calls[0]"),
        ({"tool_calls": {"name": "f"}}, "tool_calls"),
        ({"tool_calls": [{"function": {}}]}, "tool_calls[0]"),
        ({"reasoning_content": ["a"]}, "reasoning"),
        ({"content": [{"type": "image_url"}]}, "content[0]"),
        ({"content": None}, "content"),
        ({"role": "asistant"}, "did you mean 'assistant'"),
    ],
)
def test_what_would_change_a_message_is_refused(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | change]
    (problem,) = problems_of(tmp_path, {"messages": messages})
    assert problem.startswith("line 1: messages[1]") and name in problem


def test_only_the_assistant_can_be_marked_as_learned(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a", "train": True}]
    (problem,) = problems_of(tmp_path, {"messages": messages})
    assert "train_on_inputs" in problem


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 2], "labels": [-100, 2]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": 1},
            ]
        },
    ],
)
def test_rows_that_say_what_is_learned_do_not_go_with_learning_all(
    tmp_path: Path, row: Any
) -> None:
    (problem,) = problems_of(tmp_path, row, train_on_inputs=True)
    assert "train_on_inputs" in problem


def test_ignored_fields_are_counted(tmp_path: Path) -> None:
    messages = [message | {"id": 1} for message in CHAT_ROW["messages"]]
    found = read_all(tmp_path, CHAT_ROW | {"source": "x"}, {"messages": messages, "source": "y"})
    assert found.ignored == {"source": 2, "messages[].id": 1}


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
    assert read(tmp_path, row) == [TextRow("", ())]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert read_rows(path, reading()).num_rows == 2


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
        ({"input_ids": None}, "none of the known formats"),
        ({"input_ids": [300]}, "input_ids[0]"),
        ({"input_ids": [-1]}, "input_ids[0]"),
        ({"input_ids": [True]}, "input_ids[0]"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: are 1"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels[0] = 2: want 1"),
        ({"input_ids": [1], "labels": [-1]}, "labels[0]"),
        ({"input_ids": [1], "labels": {"a": 1}}, "labels"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (
            {"conversations": [{"from": "gpt", "value": "x", "weight": 0.5}]},
            "conversations[0].weight",
        ),
        ({"article": "x"}, "none of the known formats"),
        ({}, "none of the known formats"),
    ],
)
def test_a_wrong_row_is_one_problem(tmp_path: Path, row: Any, field: str) -> None:
    (problem,) = problems_of(tmp_path, row)
    assert problem.startswith("line 1: ") and field in problem


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ALPACA_ROW, *[{"instruction": "a"}] * 50)
    with pytest.raises(ConfigError) as caught:
        read_rows(path, reading())
    assert caught.value.problems.total == 50
    assert len(str(caught.value).splitlines()) <= 20


def test_the_last_line_may_lack_its_end_and_a_cut_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(ConfigError, match="line 2, column"):
        read_rows(path, reading())


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(ConfigError, match="line 2: not UTF-8"):
        read_rows(path, reading())


def test_an_array_of_objects_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ALPACA_ROW, {"instruction": "a"}], indent=1))
    with pytest.raises(ConfigError, match="row 2: output: is missing"):
        read_rows(path, reading())
    path.write_text(json.dumps([ALPACA_ROW, ALPACA_ROW], indent=1))
    assert read_rows(path, reading()).rows == read(tmp_path, ALPACA_ROW, ALPACA_ROW)


def test_one_object_over_several_lines_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ALPACA_ROW, indent=1))
    with pytest.raises(ConfigError, match="want one object per line"):
        read_rows(path, reading())


def test_rows_inside_an_object_are_recognised(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, {"version": 1, "data": [ALPACA_ROW]})
    assert problem.startswith("line 1: data: holds a list of objects") and "jq" in problem


def test_csv_and_parquet_are_read(tmp_path: Path) -> None:
    import pandas as pd

    rows = [ALPACA_ROW, {"instruction": "007", "input": "", "output": 'NA, "quoted"\nline'}]
    expected = read(tmp_path, *rows)
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    assert read_rows(tmp_path / "rows.csv", reading()).rows == expected
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet", reading()).rows == expected


def test_nulls_that_arrow_filled_in_are_not_there(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    messages = [
        {"role": "user", "content": "hi", "weight": None},
        {"role": "assistant", "content": "hello", "weight": 1},
    ]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}]), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet", reading()).rows
    assert parts(row) == ("<|user|>\nhi\n<|assistant|>\n", "hello</s>")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("instruction,output\nq1,o1,oops\n", "row 1 (to line 2): has 3 cells, the header 2"),
        ("instruction,output\nq1\n", "has 1 cells"),
        ("instruction;output\nq1;o1\n", "separated by ';'"),
        ("output,output\na,b\n", "more than once"),
        ("input_ids\n[1\n", "not valid JSON"),
    ],
)
def test_a_csv_file_loses_no_cell(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_rows(path, reading())
    assert problem in str(caught.value)


def test_lists_in_a_csv_file_are_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('input_ids,completion_mask\n"[5, 6, 7]","[0, 1, 1]"\n')
    assert read_rows(path, reading()).rows == [TokenRow([5, 6, 7], [-100, 6, 7])]


@pytest.mark.parametrize("name", ["rows.txt", "rows.tsv", "rows.jsonl.gz", "rows.ARROW"])
def test_other_formats_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"a\tb\n" * 50)
    with pytest.raises(ConfigError, match="to_json") as caught:
        read_rows(path, reading())
    assert caught.value.problems.total == 1


def test_nulls_are_not_there(tmp_path: Path) -> None:
    columns = {"messages": None, "input_ids": None, "instruction": None, "weight": None}
    (row,) = read(tmp_path, columns | {"question": "Q", "output": "A"})
    assert parts(row)[1] == "A</s>"


def test_a_setting_that_does_not_apply_is_refused(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, ALPACA_ROW, json_key="boddy")
    assert problem.startswith("json_key = ")
    both = ALPACA_ROW | {"text": "all"}
    (problem,) = problems_of(tmp_path, both, json_key="text")
    assert "this field, but instruction, too" in problem and "remove json_key" in problem
    messages = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    row = dict(zip(("prompt", "completion"), messages, strict=True))
    (problem,) = problems_of(tmp_path, row, prompt="alpaca")
    assert problem.startswith("prompt = ")


def test_a_later_row_of_another_format_is_refused(tmp_path: Path) -> None:
    rows = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "input": "c"}
    assert problems_of(tmp_path, *rows)[0].startswith("line 2: input")
    rows = {"text": "a"}, {"text": "a", "messages": [{"role": "user", "content": "b"}]}
    assert problems_of(tmp_path, *rows)[0].startswith("line 2: messages")


def test_the_first_row_says_the_format(tmp_path: Path) -> None:
    (problem,) = problems_of(tmp_path, {"text": "a"}, ALPACA_ROW)
    assert "line 1 says that the file has rows of the format text" in problem


def test_everything_is_learned_where_that_is_asked(tmp_path: Path) -> None:
    found = read_all(tmp_path, ALPACA_ROW | {"output": ""}, train_on_inputs=True)
    (row,) = found.rows
    assert isinstance(row, TextRow) and row.learned == ((0, len(row.text)),)
    assert found.learns == "everything"
    (row,) = read(tmp_path, {"messages": CHAT_ROW["messages"][:2]}, train_on_inputs=True)
    assert isinstance(row, TextRow) and row.learned == ((0, len(row.text)),)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv", "rows.json"])
def test_files_that_are_not_what_their_name_says(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"[\xff\xfe" if name == "rows.json" else b"\xff\xfe\x00")
    with pytest.raises(ConfigError) as caught:
        read_rows(path, reading())
    assert len(caught.value.problems) == 1 and str(path) in str(caught.value)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == ["has no rows"]


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
        found = read_rows(path, reading())
    except ConfigError as error:
        assert all(problem.startswith(f"{path}: ") for problem in error.problems)
    else:
        assert found.num_rows == len(rows)
