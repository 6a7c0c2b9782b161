"""A small base model with a tokenizer, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tasks.tokenizer import train_tokenizer
from tests.model.support import save_llama


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small random Llama with a byte-level tokenizer of 300 tokens."""
    folder = save_llama(tmp_path_factory.mktemp("tiny-base") / "base", vocab_size=300)
    tokenizer = train_tokenizer(["one small text to train on", "and another small text"], 300)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder
