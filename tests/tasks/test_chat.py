from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tasks.chat import chat_renderer
from tasks.dataset import MASKED, load_dataset
from tests.tasks.support import CHATML, small_tokenizer, task, write_rows

MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_tokenizer(tmp_path_factory.mktemp("chatml"), CHATML)


def test_no_template_no_renderer(tokenizer: Any) -> None:
    assert chat_renderer(tokenizer) is None


def test_turns_are_those_of_the_template(chatml: Any) -> None:
    render = chat_renderer(chatml)
    assert render is not None
    row = render(MESSAGES)
    assert row is not None and row.complete
    whole = chatml.apply_chat_template(MESSAGES, tokenize=False)
    assert "".join(read + learned for read, learned in row.turns) == whole
    assert [learned for _, learned in row.turns] == ["hello<|im_end|>\n", "ciao<|im_end|>\n"]
    assert row.turns[0][0].endswith("<|im_start|>assistant\n")


def test_the_data_set_holds_what_the_tokenizer_itself_makes_of_it(
    chatml: Any, tmp_path: Path
) -> None:
    write_rows(tmp_path, {"messages": MESSAGES})
    tokens, labels = load_dataset(task(), chatml, tmp_path).sequence(0)
    ids = chatml.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert tokens.tolist() == [chatml.bos_token_id, *ids]
    assert chatml.decode(labels[labels != MASKED]) == "hello<|im_end|>\nciao<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[-1]['content'] }}", "rewrites earlier turns"),
        ("{{ messages | length }}{% if add_generation_prompt %}>{% endif %}", "rewrites"),
        ("{% if %}", "raises"),
    ],
)
def test_templates_that_cannot_be_split_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, reason: str
) -> None:
    tokenizer = small_tokenizer(tmp_path, template)
    render = chat_renderer(tokenizer)
    assert render is not None
    with caplog.at_level(logging.WARNING, "tasks.chat"):
        assert render(MESSAGES) is None
        assert render(MESSAGES) is None
    assert len(caplog.records) == 1 and reason in caplog.text


def test_a_message_cannot_end_its_own_turn(chatml: Any, tmp_path: Path) -> None:
    sly = [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]
    write_rows(tmp_path, {"messages": sly})
    tokens, labels = load_dataset(task(), chatml, tmp_path).sequence(0)
    assert chatml.convert_tokens_to_ids("<|im_end|>") not in tokens
    assert chatml.decode(labels[labels != MASKED]) == "y</s>"
