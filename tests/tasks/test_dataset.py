from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.dataset import MASKED, TokenizedDataset, load_dataset
from lobra.tasks.prompts import ALPACA
from lobra.tasks.task_file import load_trainer_config
from lobra.tasks.tokenizer import load_tokenizer
from tests.tasks.support import rendered, task, write_rows

ROWS = [
    {"instruction": "Say cat.", "input": "", "output": "cat"},
    {"instruction": "Say dog.", "input": "twice", "output": "dog dog"},
]


def learned(data: TokenizedDataset, index: int) -> np.ndarray:
    labels = data.sequence(index)[1]
    return labels[labels != MASKED]


def test_prompts_are_masked_and_targets_end(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, *ROWS)
    data = load_dataset(task(), tokenizer, tmp_path)
    assert len(data) == 2 and (data.num_truncated, data.num_dropped) == (0, 0)
    assert data.tokens.dtype == data.labels.dtype == np.int32
    assert data.offsets.dtype == data.lengths.dtype == np.int64
    for index, row in enumerate(ROWS):
        tokens, labels = data.sequence(index)
        assert len(tokens) == len(labels) == data.lengths[index]
        prompt, _ = rendered(ALPACA, row["instruction"], row["input"], row["output"])
        assert tokenizer.decode(tokens) == f"<s>{prompt}{row['output']}</s>"
        assert tokenizer.decode(learned(data, index)) == f"{row['output']}</s>"
        assert np.array_equal(labels[labels != MASKED], tokens[labels != MASKED])


def test_inputs_can_be_learned_too(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, *ROWS)
    data = load_dataset(task(train_on_inputs=True), tokenizer, tmp_path)
    for index in range(2):
        tokens, labels = data.sequence(index)
        assert labels[0] == MASKED and np.array_equal(labels[1:], tokens[1:])


def test_the_first_label_is_never_learned(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, {"input_ids": [5, 6]}, {"input_ids": [7]}, {"input_ids": [8, 9, 10]})
    data = load_dataset(task(), tokenizer, tmp_path)
    # a lone token has nothing before it to be predicted from
    assert data.num_dropped == 1
    assert data.labels.tolist() == [MASKED, 6, MASKED, 9, 10]


def test_long_sequences_are_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    long = {"instruction": "Sum up.", "input": "the cat sat " * 200, "output": "cat"}
    write_rows(tmp_path, ROWS[0], long)
    data = load_dataset(task(context_length=150, prompt="plain"), tokenizer, tmp_path)
    assert (len(data), data.num_truncated, data.num_dropped) == (2, 1, 0)
    assert data.report is not None
    assert "1 sequences cut to 150 tokens" in data.report.remarks()
    assert data.lengths[1] == 150
    text = tokenizer.decode(data.sequence(1)[0])
    assert text.startswith("<s>Sum up.\nthe cat") and text.endswith("sat \ncat</s>")
    assert tokenizer.decode(learned(data, 1)) == "cat</s>"


def test_a_target_that_is_cut_has_no_end(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, {"instruction": "a", "output": "the cat sat " * 100})
    data = load_dataset(task(context_length=64, prompt="plain"), tokenizer, tmp_path)
    assert data.lengths.tolist() == [64] and data.num_truncated == 1
    assert tokenizer.eos_token_id not in data.tokens


def test_rows_without_target_are_dropped_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, ROWS[0], {"instruction": "a", "output": " "}, ROWS[1])
    data = load_dataset(task(), tokenizer, tmp_path)
    assert (len(data), data.num_dropped) == (2, 1)
    assert tokenizer.decode(learned(data, 1)) == "dog dog</s>"


def test_data_without_any_target_is_a_mistake(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, {"instruction": "a", "output": ""})
    with pytest.raises(ConfigError, match="none of its 1 rows"):
        load_dataset(task(), tokenizer, tmp_path)
    write_rows(tmp_path, *ROWS)
    with pytest.raises(ConfigError, match="context_length = 1"):
        load_dataset(task(context_length=1), tokenizer, tmp_path)
    assert len(load_dataset(task(context_length=2), tokenizer, tmp_path)) == 2


def test_save_and_load(tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, *ROWS, {"instruction": "a", "output": ""})
    data = load_dataset(task(context_length=100), tokenizer, tmp_path)
    data.save(tmp_path / "saved")
    again = TokenizedDataset.load(tmp_path / "saved")
    for name in ("tokens", "labels", "offsets"):
        array = getattr(again, name)
        assert isinstance(array, np.memmap) and not array.flags.writeable
        assert np.array_equal(array, getattr(data, name))
    assert (again.num_truncated, again.num_dropped) == (data.num_truncated, data.num_dropped)
    data.save(tmp_path / "saved")  # over an older one, which stays mapped
    assert np.array_equal(again.tokens, data.tokens)


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "offsets.npy", "counts.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "short", "wrong"])
def test_damaged_files_are_refused(tokenizer: Any, tmp_path: Path, name: str, damage: str) -> None:
    write_rows(tmp_path, *ROWS)
    load_dataset(task(), tokenizer, tmp_path).save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "wrong":
        if name == "counts.json":
            path.write_text("{}")
        else:
            np.save(path, np.arange(7, dtype=np.int64 if name == "offsets.npy" else np.int32))
    elif damage != "missing":
        path.write_bytes({"empty": b"", "garbage": b"garbage", "short": content[:-9]}[damage])
    with pytest.raises(ConfigError, match="tokenise it again|of one axis"):
        TokenizedDataset.load(tmp_path / "saved")


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    for name in ("tokens", "labels", "offsets"):
        np.save(tmp_path / f"{name}.npy", np.array([print], dtype=object), allow_pickle=True)
    (tmp_path / "counts.json").write_text(json.dumps({"num_truncated": 0, "num_dropped": 0}))
    with pytest.raises(ConfigError):
        TokenizedDataset.load(tmp_path)


@pytest.mark.parametrize("index", [-1, 2])
def test_there_is_no_other_sequence(tokenizer: Any, tmp_path: Path, index: int) -> None:
    write_rows(tmp_path, *ROWS)
    with pytest.raises(IndexError):
        load_dataset(task(), tokenizer, tmp_path).sequence(index)


def test_loading_data_does_not_need_torch(tmp_path: Path) -> None:
    write_rows(tmp_path, *ROWS)
    program = (
        "import sys\n"
        "from lobra.tasks.tokenizer import load_tokenizer, train_tokenizer\n"
        "from lobra.tasks.dataset import load_dataset\n"
        "from tests.tasks.support import TEXTS, save_tokenizer, task\n"
        f"save_tokenizer(train_tokenizer(TEXTS, 300), {str(tmp_path)!r})\n"
        f"load_dataset(task(), load_tokenizer({str(tmp_path)!r}), {str(tmp_path)!r})\n"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "False"


REAL = ["dolly_3k", "gsm8k", "us_bills_115_all"]  # with inputs, without, and long
MORE_REAL = ["codegen_gpt4", "evol_instruct_code", "pubmedqa"]


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Any:
    return load_tokenizer(shared / "tokenizers")


@pytest.mark.parametrize(
    "name", [*REAL, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_REAL)]
)
def test_real_data(shared: Path, project_root: Path, gpt2: Any, name: str) -> None:
    config = load_trainer_config(project_root / "trainer_config" / "real12.json")
    (found,) = (entry for entry in config.tasks if entry.name == name)
    found = replace(found, context_length=1024)
    data = load_dataset(found, gpt2, shared / "data")
    with (shared / "data" / f"{name}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(data) + data.num_dropped == len(rows)
    assert data.num_truncated == np.sum(data.lengths == 1024) or data.num_truncated > 0
    assert data.lengths.max() <= 1024 and data.lengths.min() >= 2
    checked = 0
    for index in range(0, len(data) if not data.num_dropped else 0, 97):
        row, (tokens, labels) = rows[index], data.sequence(index)
        target = gpt2.decode(labels[labels != MASKED])
        assert np.all((labels == MASKED) | (labels == tokens))
        if len(tokens) < 1024:
            prompt, output = rendered(ALPACA, row["instruction"], row["input"], row["output"])
            assert gpt2.decode(tokens) == f"{prompt}{output}<|endoftext|>"
            assert target.endswith(f"{output}<|endoftext|>")
            checked += 1
    assert checked or data.num_dropped
