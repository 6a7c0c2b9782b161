from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lobra.tasks.encoding import cut
from lobra.tasks.text_processor import TextProcessor
from lobra.tasks.text_rows import TextRow
from lobra.tasks.tokenizer import train_tokenizer
from tests.tasks.support import TEXTS

texts = st.text(max_size=25) | st.sampled_from(TEXTS) | st.sampled_from(["</s>", "<s> <pad>"])


def row_of(*turns: tuple[str, str], end: str = "</s>") -> TextRow:
    """Return a row of fields: what is read, what is learned and the end token, and so on."""
    text, learned, verbatim = "", [], []
    for read, target in turns:
        start = len(text)
        text += read + target
        verbatim.append((start, len(text)))
        text += end
        learned.append((start + len(read), len(text)))
    return TextRow(text, tuple(learned), tuple(verbatim))


@given(st.lists(st.lists(st.tuples(texts, texts), max_size=3), max_size=4))
@settings(deadline=None)
def test_read_and_learned_texts_come_back(
    tokenizer: Any, conversations: list[list[tuple[str, str]]]
) -> None:
    encoded = TextProcessor.of(tokenizer).encoder.encode(
        [row_of(*turns) for turns in conversations]
    )
    assert len(encoded) == len(conversations)
    for turns, (tokens, learned, _) in zip(conversations, encoded, strict=True):
        assert tokens.dtype == np.int32 and learned.dtype == np.bool_
        assert len(tokens) == len(learned)
        text = "".join(f"{prompt}{target}</s>" for prompt, target in turns)
        assert tokenizer.decode(tokens) == (f"<s>{text}" if turns else "")
        ends = tokens == tokenizer.eos_token_id
        assert ends.sum() == len(turns) and np.all(learned[ends])
        assert (tokens == tokenizer.bos_token_id).sum() == bool(turns)
        assert tokenizer.pad_token_id not in tokens


@given(prompt=texts, target=texts)
@settings(deadline=None)
def test_every_character_of_the_target_is_learned(tokenizer: Any, prompt: str, target: str) -> None:
    ((tokens, learned, _),) = TextProcessor.of(tokenizer).encoder.encode([row_of((prompt, target))])
    spelled = tokenizer.decode(tokens[learned])
    assert spelled.endswith(f"{target}</s>") or "\ufffd" in spelled
    first = int(learned.argmax())
    assert np.all(learned[first:])
    # What is read is all of the prompt, but for a token that reaches into the target.
    read = tokens[1:first]
    assert prompt.encode().startswith(tokenizer.decode(read).encode()) or "\ufffd" in (
        tokenizer.decode(read)
    )
    spanning = tokenizer.decode(tokens[first : first + 1])
    assert len(tokenizer.decode(read)) + len(spanning) >= len(prompt)


def test_text_that_looks_like_a_special_token_is_text(tokenizer: Any) -> None:
    encoder = TextProcessor.of(tokenizer).encoder
    ((tokens, _, is_spelled),) = encoder.encode([row_of(("a </s> b", "<pad>"))])
    assert list(tokens).count(tokenizer.eos_token_id) == 1 and is_spelled
    assert tokenizer.pad_token_id not in tokens
    # the characters are what the tokenizer makes of them when no token is special
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    spelled = backend.encode("a </s> b<pad>", add_special_tokens=False).ids
    backend.encode_special_tokens = False
    assert tokens.tolist() == [tokenizer.bos_token_id, *spelled, tokenizer.eos_token_id]
    # and the tokenizer behaves for others as it did
    assert tokenizer.eos_token_id in tokenizer("a </s>").input_ids


def test_outside_of_fields_special_tokens_are_tokens(tokenizer: Any) -> None:
    row = TextRow("<s>hi</s>cat</s>", ((9, 16),), ((5, 9),))
    ((tokens, learned, _),) = TextProcessor.of(tokenizer).encoder.encode([row])
    assert list(tokens).count(tokenizer.bos_token_id) == 1
    assert list(tokens).count(tokenizer.eos_token_id) == 1
    assert tokens[-1] == tokenizer.eos_token_id and learned[-1]
    assert tokenizer.decode(tokens) == row.text
    assert tokenizer.decode(tokens[learned]) == "cat</s>"


@given(st.lists(st.tuples(texts | st.sampled_from(["<", "/s>", " "]), st.booleans()), max_size=6))
@settings(deadline=None)
def test_no_field_writes_a_special_token(tokenizer: Any, pieces: list[tuple[str, bool]]) -> None:
    """Also not together with what stands beside it."""
    text, verbatim = "", []
    for piece, is_field in pieces:
        if is_field:
            verbatim.append((len(text), len(text) + len(piece)))
        text += piece
    ((tokens, _, is_spelled),) = TextProcessor.of(tokenizer).encoder.encode(
        [TextRow(text, (), tuple(verbatim), begins=False)]
    )
    assert tokenizer.decode(tokens) == text
    spelled = [m.span() for m in re.finditer("</s>|<s>|<pad>", text)]
    free = [s for s in spelled if not any(s[0] < b and a < s[1] for a, b in verbatim)]
    assert sum(int(token) in (0, 1, 2) for token in tokens) == len(free)
    assert is_spelled == (len(free) < len(spelled))


def llama2_like() -> Any:
    """Return a tokenizer whose normaliser writes spaces as a mark, one before every text."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS * 3, "Answer:\n  one\nAnswer: two"], trainer)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama3_like() -> Any:
    """Return a byte-level tokenizer that leaves spaces out of the offsets of its tokens."""
    backend = train_tokenizer(TEXTS, 300)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("target", ["cat", "  one", "\n\n two", "\u00e9\U0001f600 a", "a  \n", " "])
@pytest.mark.parametrize("prompt", ["Answer:\n", "\u00fc\U0001f600 Answer: the\n", "", "cat"])
@pytest.mark.parametrize("make", [llama2_like, llama3_like])
def test_boundaries_of_other_tokenizers(make: Callable[[], Any], prompt: str, target: str) -> None:
    other = make()
    ((tokens, learned, _),) = TextProcessor.of(other).encoder.encode([row_of((prompt, target))])
    whole = other.backend_tokenizer.encode(prompt + target, add_special_tokens=False).ids
    beginning = [1] if make is llama2_like else []
    assert tokens.tolist() == [*beginning, *whole, other.eos_token_id]
    first = int(learned.argmax())
    assert np.all(learned[first:]) and learned.any()
    # The boundary is the first token at which the text is no longer all prompt.
    ids = tokens[len(beginning) :].tolist()
    count = first - len(beginning)
    assert prompt.startswith(other.decode(ids[:count]).replace("\ufffd", ""))
    if not prompt:
        assert count == 0
    elif target.strip():
        assert len(other.decode(ids[: count + 1])) > len(prompt)


@given(prompt=st.integers(0, 300), target=st.integers(0, 300), context=st.integers(1, 200))
@settings(deadline=None)
def test_cutting(prompt: int, target: int, context: int) -> None:
    tokens = np.arange(prompt + target, dtype=np.int32)
    learned = tokens >= prompt
    kept, mask = cut(tokens, learned, context)
    assert len(kept) == len(mask) == min(context, prompt + target)
    assert np.all(np.diff(kept) > 0)  # nothing is moved or doubled
    assert np.array_equal(mask, kept >= prompt)
    if prompt + target <= context:
        return
    num_target, num_prompt = int(mask.sum()), int((~mask).sum())
    # the target's beginning stays; the prompt loses its middle
    assert kept[mask].tolist() == list(range(prompt, prompt + num_target))
    removed = sorted(set(range(prompt)) - set(kept[~mask].tolist()))
    assert removed == list(range(removed[0], removed[0] + len(removed))) if removed else True
    if removed and num_prompt > 1:
        assert removed[0] > 0 and removed[-1] < prompt - 1
    # a target of at most half the context is whole; a longer one keeps its share, at least
    if target <= context // 2:
        assert num_target == target
    else:
        assert num_target >= min(context // 2, target)
        assert num_target >= round(context * target / (prompt + target)) - 1
    if target:
        assert num_target >= 1
    if num_target < target and num_prompt < prompt:
        assert num_target >= context // 2
