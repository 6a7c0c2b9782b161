"""A small base model with a tokenizer, shared by the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lobra.tasks.tokenizer import train_tokenizer
from tests.model.support import save_llama
from tests.trainer.command import write_config, write_plan


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small random Llama of four layers, without a tokenizer."""
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small random Llama with a byte-level tokenizer of 300 tokens."""
    folder = save_llama(tmp_path_factory.mktemp("tiny-base") / "base", vocab_size=300)
    tokenizer = train_tokenizer(["one small text to train on", "and another small text"], 300)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> Path:
    """A folder with a valid set-up of a run; each test breaks something."""
    monkeypatch.chdir(tmp_path)
    for name in ("DP_BUCKET", "EXPR_DATA_DISPATCH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (9, 40)]
    Path("data").mkdir()
    Path("data/small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_config()
    write_plan({"dp": 1, "tp": 1, "pp": 1, "max_tokens": 64})
    lines = ["tp,seq_len,mbs,time"]
    lines += [f"1,{s},{b},{1 + b * s / 50}" for s in (16, 32, 64, 128) for b in (1, 2, 4)]
    Path("time.csv").write_text("\n".join(lines) + "\n")
    return tiny_base
