"""docs/data.md names every field that is obeyed or refused, and its examples are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lobra.tasks.conversations import (
    FLAGS,
    REASONING,
    REFUSED_MARKS,
    REFUSED_MESSAGE_FIELDS,
    ROLE_ALIASES,
    SETTINGS,
)
from lobra.tasks.dataset import load_dataset
from lobra.tasks.fields import (
    INPUT,
    INSTRUCTION,
    OUTPUT,
    REFUSED,
    ROLLOUT_FIELDS,
    TOKEN_FIELDS,
)
from lobra.tasks.prompts import NAMES, ROLES
from tests.tasks.families import load_family
from tests.tasks.support import task, write_rows


@pytest.fixture(scope="module")
def page(project_root: Path) -> str:
    return (project_root / "docs" / "data.md").read_text(encoding="utf-8")


def test_every_name_is_there(page: str) -> None:
    names = {*INSTRUCTION, *INPUT, *OUTPUT, *REFUSED, *TOKEN_FIELDS, *SETTINGS}
    names |= {"role", "content", "name", "tool_calls", "tool_call_id", *REASONING, *FLAGS}
    names |= {
        *ROLLOUT_FIELDS,
        *REFUSED_MARKS,
        *REFUSED_MESSAGE_FIELDS,
        *ROLES,
        *ROLE_ALIASES,
        *NAMES,
    }
    assert not {name for name in names if f"`{name}`" not in page}


def test_examples_are_read(page: str, tmp_path: Path) -> None:
    tokenizer: Any = load_family("qwen25", tmp_path / "families")
    examples = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 8
    for number, example in enumerate(examples):
        row = json.loads(example)
        marks = {"chosen": "dpo", "label": "kto", "advantages": "ppo"}
        objective = next((own for mark, own in marks.items() if mark in row), "supervised")
        write_rows(tmp_path, row, name=f"rows{number}")
        own = task(dataset_name=f"rows{number}", objective=objective)
        data = load_dataset(own, tokenizer, tmp_path)
        assert data.num_examples == 1 and data.num_labels
