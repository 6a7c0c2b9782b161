"""The published data sets: rows as the hub has them become alpaca rows that the loader reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.tasks.published import DATASETS, check_names, write_converted
from lobra.tasks.sources import PUBLISHED

# One row of each, with the columns its data card lists.
ROWS: dict[str, dict[str, Any]] = {
    "dolly": {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
    "python_code_instructions": {"instruction": "i", "input": "c", "output": "r", "prompt": "p"},
    "evol_instruct": {"instruction": "i", "response": "r"},
    "commitpackft": {"id": "1", "language": "c", "instruction": "i", "input": "c", "output": "r"},
    "MathInstruct": {"source": "s", "output": "r", "instruction": "i"},
    "MetaMathQA": {"type": "t", "query": "i", "original_question": "q", "response": "r"},
    "NuminaMath-CoT": {"source": "s", "problem": "i", "solution": "r", "messages": []},
    "PubMedQA": {
        "pubid": 1,
        "question": "i",
        "context": {"contexts": ["c", "d"], "labels": [], "meshes": []},
        "long_answer": "r",
        "final_decision": "yes",
    },
    "xsum": {"document": "c", "summary": "r", "id": "1"},
    "billsum": {"text": "c", "summary": "r", "title": "t"},
    "cnn_dailymail": {"article": "c", "highlights": "r", "id": "1"},
    "meetingbank": {"summary": "r", "uid": "u", "id": 1, "transcript": "c"},
}

WITH_INPUT = dict.fromkeys(("dolly", "python_code_instructions", "commitpackft"), "c")
WITH_INPUT |= dict.fromkeys(("xsum", "billsum", "cnn_dailymail", "meetingbank"), "c")
WITH_INPUT |= {"PubMedQA": "c\nd"}


def test_the_names_are_those_the_loader_promises() -> None:
    assert set(DATASETS) == set(PUBLISHED) == set(ROWS)
    assert len(DATASETS) == 12


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_alpaca(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.jsonl"
    assert write_converted([ROWS[name]] * 2, DATASETS[name], path) == 2
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert list(row) == ["instruction", "input", "output"]
    assert row["output"] == "r"
    assert row["instruction"], "something is asked"
    assert row["input"] == WITH_INPUT.get(name, "")


def test_rows_without_output_are_left_out_and_none_left_is_an_error(tmp_path: Path) -> None:
    empty = ROWS["xsum"] | {"summary": " "}
    assert write_converted([empty, ROWS["xsum"]], DATASETS["xsum"], tmp_path / "x.jsonl") == 1
    with pytest.raises(ConfigError, match="no row has an output"):
        write_converted([empty], DATASETS["xsum"], tmp_path / "y.jsonl")
    assert not (tmp_path / "y.jsonl").exists()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="row 1: no usable 'document'; its columns are text"):
        write_converted([{"text": "t"}], DATASETS["xsum"], tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_are_all_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ConfigError) as error:
        check_names(["xsums", "dolly", "nothing"])
    assert len(error.value.problems) == 2
    assert "did you mean 'xsum'?" in str(error.value)
    assert main(["data", "fetch", "xsums"]) == 2
    assert "unknown" in capsys.readouterr().err


def test_what_is_there_is_not_fetched_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "dolly.jsonl").write_text("{}\n", encoding="utf-8")
    assert main(["data", "fetch", "dolly", "--data-dir", str(tmp_path)]) == 0
    assert "there already" in capsys.readouterr().out
