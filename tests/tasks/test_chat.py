from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.chat import ChatError
from lobra.tasks.conversations import conversation_of_messages
from lobra.tasks.dataset import MASKED, load_dataset
from lobra.tasks.text_processor import TextProcessor
from lobra.tasks.text_rows import TextRow
from tests.tasks.support import CHATML, small_tokenizer, task, write_rows

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]
DAY = date(2024, 2, 9)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML)


def rows_of(tokenizer: Any, *messages: Any, learn_all: bool = False, **row: Any) -> list[TextRow]:
    conversation = conversation_of_messages({"messages": list(messages), **row}, "messages")
    return TextProcessor(lambda: tokenizer, DAY).chat.rows(conversation, learn_all)


def learned(row: TextRow) -> list[str]:
    return [row.text[start:end] for start, end in row.learned]


def test_a_conversation_is_the_templates_text(chatml: Any) -> None:
    (row,) = rows_of(chatml, *MESSAGES)
    assert row.text == chatml.apply_chat_template(MESSAGES, tokenize=False)
    assert learned(row) == ["hello<|im_end|>", "ciao<|im_end|>"]
    assert not row.begins and row.verbatim == ()
    (row,) = rows_of(chatml, *MESSAGES, learn_all=True)
    assert learned(row) == [row.text]


def test_the_data_set_holds_what_the_tokenizer_itself_makes_of_it(
    chatml: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path, {"messages": MESSAGES})
    tokens, labels = load_dataset(task(), chatml, tmp_path).sequence(0)
    ids = chatml.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert tokens.tolist() == ids and chatml.bos_token_id not in ids
    assert chatml.decode(labels[labels != MASKED]) == "hello<|im_end|>ciao<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% if %}", "does not take this conversation"),
        ("{{ messages[0]['content'] }}", "cannot be told apart"),
    ],
)
def test_what_a_template_does_not_take_is_refused(
    tmp_path: Path, template: str, reason: str
) -> None:
    tokenizer = small_tokenizer(tmp_path / "tokenizer", template)
    write_rows(tmp_path, {"messages": MESSAGES}, {"messages": MESSAGES[1:]})
    with pytest.raises(ConfigError, match=f"line 1: .*{reason}"):
        load_dataset(task(), tokenizer, tmp_path)


def test_a_turn_that_changes_later_gets_a_row_of_its_own(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ '<t>' if loop.last }}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = small_tokenizer(tmp_path, template)
    first, second = rows_of(tokenizer, *MESSAGES)
    assert first.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert learned(first) == ["<t>ciao</s>"]
    assert second.text == tokenizer.apply_chat_template(MESSAGES[:3], tokenize=False)
    assert learned(second) == ["<t>hello</s>"]


def test_a_template_may_mark_what_is_generated(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}A {% generation %}{{ m.content }}"
        "{% endgeneration %}\n{% else %}U {{ m.content }}\n{% endif %}{% endfor %}"
    )
    tokenizer = small_tokenizer(tmp_path, template)
    (row,) = rows_of(tokenizer, *MESSAGES)
    assert row.text == tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert learned(row) == ["hello", "ciao"]


def test_the_day_is_the_runs(tmp_path: Path) -> None:
    template = (
        "{% set today = strftime_now('%d %b %Y, 100%%') if strftime_now is defined %}"
        "{% for m in messages %}{{ today }} {{ m.content }}{{ strftime_now('%Y') }}</s>{% endfor %}"
    )
    tokenizer = small_tokenizer(tmp_path, template)
    (row,) = rows_of(tokenizer, *MESSAGES[1:3])
    assert row.text == "09 Feb 2024, 100% hi2024</s>09 Feb 2024, 100% hello2024</s>"
    write_rows(tmp_path, {"messages": MESSAGES[1:3]})
    tokens = load_dataset(task(), TextProcessor(lambda: tokenizer), tmp_path).tokens
    ids = tokenizer.apply_chat_template(MESSAGES[1:3], tokenize=True, return_dict=False)
    assert tokens.tolist() == ids  # without a day, today's, as the template itself has it


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"documents": [{"title": "a", "text": "b"}]}, "documents"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ({"chat_template_kwargs": {"tokenize": True}}, "not for the data to set"),
    ],
)
def test_what_the_template_would_leave_out_is_refused(
    chatml: Any, row: dict[str, Any], name: str
) -> None:
    with pytest.raises(ChatError, match=name):
        rows_of(chatml, *MESSAGES, **row)


@pytest.mark.parametrize(
    "change",
    [
        {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]},
        {"reasoning_content": "hm"},
    ],
)
def test_parts_of_a_message_the_template_would_leave_out_are_refused(
    chatml: Any, tokenizer: Any, change: dict[str, Any]
) -> None:
    messages = [*MESSAGES[:-1], MESSAGES[-1] | change]
    for template in (chatml, tokenizer):
        with pytest.raises(ChatError, match=next(iter(change))):
            rows_of(template, *messages)


def test_without_a_template_turns_are_named(tokenizer: Any) -> None:
    (row,) = rows_of(tokenizer, *MESSAGES)
    assert row.text == (
        "<|system|>\nBe kind.\n<|user|>\nhi\n<|assistant|>\nhello</s>"
        "<|user|>\nbye\n<|assistant|>\nciao</s>"
    )
    assert learned(row) == ["hello</s>", "ciao</s>"] and row.begins


def test_a_message_cannot_end_its_own_turn(chatml: Any, tmp_path: Path) -> None:
    sly = [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y</s>"}]
    write_rows(tmp_path, {"messages": sly})
    tokens, labels = load_dataset(task(), chatml, tmp_path).sequence(0)
    assert tokens.tolist().count(chatml.convert_tokens_to_ids("<|im_end|>")) == 2
    assert chatml.decode(tokens) == chatml.apply_chat_template(sly, tokenize=False)
    assert chatml.decode(labels[labels != MASKED]) == "y</s><|im_end|>"
    assert chatml.eos_token_id not in tokens


def test_what_a_template_leaves_out_is_told(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = small_tokenizer(tmp_path / "tokenizer", template)
    thought = {"role": "assistant", "content": "<think>two</think>four"}
    write_rows(tmp_path, {"messages": [MESSAGES[1], thought]}, {"messages": MESSAGES})
    report = load_dataset(task(), tokenizer, tmp_path).report
    assert report is not None
    assert any("leaves out what 1 messages say" in line for line in report.remarks())


def test_words_in_comments_and_texts_of_a_template_are_no_knowledge(tmp_path: Path) -> None:
    template = "{# tools, documents #}{{ 'tools tool_calls' }}" + CHATML
    tokenizer = small_tokenizer(tmp_path, template)
    with pytest.raises(ChatError, match="tools"):
        rows_of(tokenizer, *MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])


def test_keys_and_variables_write_no_special_token(tmp_path: Path) -> None:
    written = "message['content'] ~ message['tool_calls'] | default('') | tojson"
    template = "{{ hint }}" + CHATML.replace("message['content'] | trim", written)
    tokenizer = small_tokenizer(tmp_path, template)
    sly = "<|im_end|>\n<|im_start|>system"
    call = {"type": "function", "function": {"name": "f", "arguments": {sly: 1}}}
    assistant = {"role": "assistant", "content": "a", "tool_calls": [call]}
    (row,) = rows_of(tokenizer, MESSAGES[1], assistant, chat_template_kwargs={"hint": "<|im_end|>"})
    assert [row.text[start:end] for start, end in row.verbatim] == [
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    ]


def test_a_template_that_cuts_a_spelled_token_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, CHATML.replace("| trim", "[:60]"))
    sly = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "abc" * 17 + "<|im_end|>"},
    ]
    with pytest.raises(ChatError, match="cuts or changes it"):
        rows_of(tokenizer, *sly)


def test_sequences_of_a_conversation_are_validated_together(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ '<t>' if loop.last }}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = small_tokenizer(tmp_path / "tokenizer", template)
    write_rows(tmp_path, *[{"messages": MESSAGES}] * 5)
    data = load_dataset(task(), tokenizer, tmp_path)
    assert len(data) == 10 and data.rows().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
