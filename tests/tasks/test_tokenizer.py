from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.tasks.tokenizer import BOS, EOS, PAD, load_tokenizer, train_tokenizer
from tests.tasks.support import TEXTS, save_tokenizer, small_tokenizer


def test_training_is_deterministic() -> None:
    assert train_tokenizer(TEXTS, 290).to_str() == train_tokenizer(iter(TEXTS), 290).to_str()


def test_special_tokens_come_first(tokenizer: Any) -> None:
    assert [tokenizer.convert_tokens_to_ids(token) for token in (PAD, BOS, EOS)] == [0, 1, 2]
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert tokenizer("cat").input_ids[0] == tokenizer.bos_token_id


def test_the_vocabulary_is_as_large_as_asked() -> None:
    assert train_tokenizer(TEXTS, 300).get_vocab_size() == 300
    assert train_tokenizer([], 300).get_vocab_size() == 259
    with pytest.raises(ValueError, match="259"):
        train_tokenizer(TEXTS, 258)


@given(st.text(max_size=60))
@settings(deadline=None)
def test_every_text_survives(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_a_folder_without_configuration_is_understood(tmp_path: Path, tokenizer: Any) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path)
    assert bare("a cat").input_ids == tokenizer("a cat").input_ids
    assert (bare.pad_token, bare.bos_token, bare.eos_token) == (PAD, BOS, EOS)


def test_gpt2s_files_load(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300).model.save(str(tmp_path), "small")
    vocab = tmp_path / "small-vocab.json"
    ids = json.loads(vocab.read_text())
    assert [ids.pop(token) for token in (PAD, BOS, EOS)] == [0, 1, 2]
    vocab.write_text(json.dumps({"<|endoftext|>": 0, "!!": 1, "??": 2, **ids}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    text = "def add(a):\n    return a"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert 0 not in tokenizer(text).input_ids


def test_gpt2s_own_files(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "tokenizers")
    # the ids that GPT-2 is known to give
    assert tokenizer("Hello world").input_ids == [15496, 995]
    assert tokenizer.eos_token_id == 50256 and len(tokenizer) == 50257


def test_a_chat_template_is_kept(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path, chat_template="{{ messages[0]['content'] }}")
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({}, "neither tokenizer.json nor"),
        ({"tokenizer.model": "x"}, "AutoTokenizer"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "cannot be read"),
        ({"vocab.json": "{}", "merges.txt": ""}, "no end token"),
        ({"vocab.json": "[]", "merges.txt": ""}, "cannot be read"),
        ({"vocab.json": "{}"}, "neither tokenizer.json nor"),
    ],
)
def test_unusable_folders_are_explained(tmp_path: Path, files: dict[str, str], hint: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=hint) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing")


def test_code_of_the_folder_is_not_run(tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path)
    (tmp_path / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T:\n    from_pretrained = None\n"
    )
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}}
    path.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_token == EOS
    assert not (tmp_path / "ran").exists()
