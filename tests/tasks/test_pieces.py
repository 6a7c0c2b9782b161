"""A text in pieces has the tokens it has whole, whatever the tokenizer; else it is not divided."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from lobra.common.errors import ConfigError
from lobra.tasks import dataset, encoding, pieces, tables
from lobra.tasks.dataset import load_dataset
from lobra.tasks.pieces import divided
from lobra.tasks.text_processor import TextProcessor
from lobra.tasks.text_rows import TextRow
from lobra.tasks.tokenizer import load_tokenizer
from tests.tasks.families import FAMILIES, load_family
from tests.tasks.support import task
from tests.tiers import examples

#: Here a text of a few dozen characters is long, and little of it is seen around a place.
SMALL = {pieces: {"PIECE": 40, "REACH": 36, "WINDOW": 12}, encoding: {"LONG_TEXT": 40}}
#: What tokenizers divide, join and normalise by.
FRAGMENTS = st.sampled_from(
    [
        *("the cat sat on", "Répondez à la", "naïve café", "ﬁne Ａ", "12345 678", "don't you'll"),
        *(" ", "  ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u2581", "...", "-- !?", "_a_b_"),
        *(
            "中文句子没有空格。",
            "日本語の文",
            "😀👍🏽",
            "e\u0301a\u0308",
            "\u00a0",
            "def f(x):\n    return x\n",
        ),
        *("</s>", "<s>", "<|endoftext|>", "<|im_end|>", "<unk>"),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=6), min_size=8, max_size=60).map("".join)
#: Tokenizers that put a space before every text, which is then in none: it is never divided.
UNDIVIDED = ("llama2", "phi3", "zephyr", "vicuna")
LIMIT_BYTES = 200 << 20


@pytest.fixture(scope="module", params=["tiny", "gpt2", *FAMILIES])
def processor(
    request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> TextProcessor:
    name = request.param
    if name == "gpt2":
        return TextProcessor.of(load_tokenizer(request.getfixturevalue("shared") / "tokenizers"))
    if name != "tiny":
        tokenizer = load_family(name, tmp_path_factory.getbasetemp() / "families")
    return TextProcessor.of(tokenizer)


@given(text=TEXTS, spans=st.lists(st.integers(0, 300), max_size=4), is_field=st.booleans())
@examples(40, 500)
def test_pieces_have_the_tokens_of_the_whole(
    processor: TextProcessor, text: str, spans: list[int], is_field: bool
) -> None:
    places = sorted({min(place, len(text)) for place in spans})
    learned = tuple(zip(places[::2], places[1::2], strict=False))
    row = TextRow(text, learned, ((0, len(text)),) if is_field else ())
    (whole,) = processor.encoder.encode([row])
    with pytest.MonkeyPatch.context() as patched:
        for module, values in SMALL.items():
            for name, value in values.items():
                patched.setattr(module, name, value)
        (found,) = processor.encoder.encode([row])
    assert np.array_equal(found.tokens, whole.tokens)
    assert np.array_equal(found.learned, whole.learned)
    assert found.is_spelled == whole.is_spelled


def test_what_is_divided(processor: TextProcessor, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["processor"]
    backend = processor.tokenizer.backend_tokenizer
    text = "the cat sat on the mat. " * 30_000
    found = divided(text, backend)
    if name in UNDIVIDED:
        assert found is None
        return
    assert found is not None and "".join(found) == text
    assert len(found) == 3
    assert all(pieces.PIECE - pieces.REACH <= len(piece) <= pieces.PIECE for piece in found[:-1])
    assert divided("a" * 300_000, backend) is None, "no word ends"
    assert divided(" " * 300_000, backend) is None


def test_a_vocabulary_with_tokens_of_several_words_divides_nothing() -> None:
    """No token reaches over most places, but what one does further away nobody sees there."""
    text = "the cat sat on the mat. " * 12_000
    vocab = {token: number for number, token in enumerate([*sorted(set(text)), "e ", "e c"])}
    joined = Tokenizer(models.BPE(vocab, [("e", " "), ("e ", "c")]))
    assert divided(text, joined) is None
    del vocab["e "], vocab["e c"]
    assert divided(text, Tokenizer(models.BPE(vocab, []))) is not None


def write_row(folder: Path, text: str) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")


def test_a_long_line_takes_bounded_memory(tokenizer: Any, tmp_path: Path) -> None:
    """Whole its 2 MB would take 400."""
    text = "the cat sat on the mat, and the dog barked at it. " * 40_000
    write_row(tmp_path, text)
    child = os.fork()
    if not child:  # what is imported already need not be imported again under the limit
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * os.sysconf("SC_PAGE_SIZE") + LIMIT_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            data = load_dataset(task(context_length=512), tokenizer, tmp_path)
            backend = tokenizer.backend_tokenizer
            ids = backend.encode(text[:4000], add_special_tokens=False).ids
            status = 0 if data.tokens.tolist() == ids[:512] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("text", ["the cat sat ", "a"])
def test_a_text_that_is_too_long_is_refused(
    text: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_MOST_CHARACTERS", 1_200_000)
    write_row(tmp_path, text * (1_300_000 // len(text)))
    most = 1_048_576 if text == "a" else 1_200_000
    with pytest.raises(ConfigError, match=rf"line 1: its text has 1\d+ .* most {most} "):
        load_dataset(task(), tokenizer, tmp_path)


def test_a_line_without_end_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MOST_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' + '{"text": "' + "a" * 5000)
    with pytest.raises(ConfigError, match="line 2: has more than 1000 bytes"):
        load_dataset(task(), tokenizer, tmp_path)
