"""Rows of preferences become examples of two sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.dataset import TokenizedDataset, load_dataset, split
from tests.tasks.support import CHATML, small_tokenizer, task, write_rows


def load(folder: Path, objective: str, *rows: Any, **fields: Any) -> TokenizedDataset:
    write_rows(folder, *rows)
    tokenizer = fields.pop("tokenizer", None) or small_tokenizer(folder / "tokenizer")
    return load_dataset(task(objective=objective, **fields), tokenizer, folder)


def texts(folder: Path, data: TokenizedDataset) -> list[tuple[str, str]]:
    """Return every sequence as (what is not learned, what is learned)."""
    tokenizer = small_tokenizer(folder / "tokenizer")
    pairs = (data.sequence(index) for index in range(len(data)))
    return [
        (tokenizer.decode(tokens[labels < 0]), tokenizer.decode(tokens[labels >= 0]))
        for tokens, labels in pairs
    ]


def test_each_answer_is_a_sequence_after_the_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": "the cat", "chosen": " sat", "rejected": " ran off"},
        {"chosen": "the mat is red", "rejected": "the mat is wet"},
    ]
    data = load(tmp_path, "dpo", *rows)
    assert data.signs is not None and data.signs.tolist() == [1, -1, 1, -1]
    assert (data.num_examples, data.example_lengths.sum()) == (2, len(data.tokens))
    assert texts(tmp_path, data) == [
        ("<s>the cat", " sat</s>"),
        ("<s>the cat", " ran off</s>"),
        ("<s>the mat is", " red</s>"),
        ("<s>the mat is", " wet</s>"),
    ]


def test_kto_compares_with_the_answer_before(tmp_path: Path) -> None:
    answers = (("one", " a", True), ("two", " bb", False), ("ten", " c", True))
    rows = [dict(prompt=p, completion=c, label=label) for p, c, label in answers]
    data = load(tmp_path, "kto", *rows)
    assert data.signs is not None and data.signs.tolist() == [1, 0, -1, 0, 1, 0]
    assert texts(tmp_path, data)[1::2] == [
        ("<s>one", " c</s>"),
        ("<s>two", " a</s>"),
        ("<s>ten", " bb</s>"),
    ]


def test_both_wordings_have_the_answer(tmp_path: Path) -> None:
    row = {"prompt": "the cat", "paraphrase": "on the mat", "completion": " sat"}
    data = load(tmp_path, "cit", row)
    assert data.signs is not None and data.signs.tolist() == [1, 1]
    assert texts(tmp_path, data) == [("<s>the cat", " sat</s>"), ("<s>on the mat", " sat</s>")]


def test_conversations_with_and_without_a_prompt_are_the_same(tmp_path: Path) -> None:
    question = [{"role": "user", "content": "the cat?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("sat", "ran"))
    tokenizer = small_tokenizer(tmp_path / "chat", CHATML)
    with_prompt = load(
        tmp_path, "orpo", dict(prompt=question, chosen=good, rejected=bad), tokenizer=tokenizer
    )
    without = load(
        tmp_path, "orpo", dict(chosen=question + good, rejected=question + bad), tokenizer=tokenizer
    )
    assert np.array_equal(with_prompt.tokens, without.tokens)
    assert np.array_equal(with_prompt.labels, without.labels)
    tokens, labels = with_prompt.sequence(0)
    whole = tokenizer.apply_chat_template(question + good, tokenize=True, return_dict=False)
    assert tokens.tolist() == whole and 0 < (labels >= 0).sum() < len(tokens)


def test_what_does_not_fit_is_dropped_whole(tmp_path: Path) -> None:
    rows = [
        {"prompt": "the cat", "chosen": " sat", "rejected": " on the mat" * 20},
        {"prompt": "the cat", "chosen": " sat", "rejected": ""},
        {"prompt": "the cat", "chosen": " sat", "rejected": " ran"},
    ]
    data = load(tmp_path, "cpo", *rows, context_length=32)
    assert (data.num_examples, data.num_dropped) == (1, 2)
    assert data.report is not None
    assert data.report.dropped == {
        "an answer and its prompt are longer than the context length": 1,
        "nothing to learn": 1,
    }


def test_examples_stay_on_one_side_and_are_kept(tmp_path: Path) -> None:
    rows = [{"prompt": f"{k}", "chosen": " sat", "rejected": " ran"} for k in range(9)]
    own = task(objective="dpo", validation_split=0.3)
    data = load(tmp_path, "dpo", *rows, validation_split=0.3)
    training, held_out = split(own, data, 0)
    assert held_out is not None
    assert (training.num_examples, held_out.num_examples) == (6, 3)
    held_out.save(tmp_path)
    again = TokenizedDataset.load(tmp_path)
    assert again.signs is not None and again.signs.tolist() == [1, -1] * 3


@pytest.mark.parametrize(
    ("objective", "row", "told"),
    [
        ("dpo", {"prompt": "a", "completion": "b"}, "the first row has no chosen"),
        ("dpo", {"prompt": "a", "chosen": "b"}, "the first row has no rejected"),
        ("orpo", {"chosen": "b", "rejected": ["c"]}, "want two texts, or two lists"),
        ("kto", {"prompt": "a", "completion": "b"}, "label = null: want true or false"),
        ("kto", {"prompt": "a", "completion": "b", "label": 1}, "want true or false"),
        ("kto", {"completion": "b", "label": True}, "prompt: is missing"),
        ("kto", {"text": "b"}, "the first row has no completion"),
        ("cit", {"prompt": "a", "completion": "b"}, "the first row has no paraphrase"),
        ("supervised", {"prompt": "a", "chosen": "b", "rejected": "c"}, "objectives dpo, cpo"),
        ("supervised", {"prompt": "a", "completion": "b", "label": True}, "kto (label)"),
    ],
)
def test_rows_of_another_objective_are_one_problem(
    objective: str, row: Any, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, objective, row)
    (problem,) = caught.value.problems
    assert told in problem
