"""From rendered rows to token ids and labels, cut to the context length.

The texts of many rows go to the fast tokenizer in one call. A row's read and learned parts are
tokenised together, as one text, and the label boundary is found from the characters: a token
that spans it counts as learned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.rows import Row, TextRow, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

MASKED = -100
_BATCH = 2048  # texts per call: bounds the memory of the tokenizer's results


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Ids, Mask]]:
    """Yield (token ids int32 [length], which of them are learned bool [length]) of every row.

    The beginning token is put before a text if the tokenizer itself does so, the end token after
    every learned part. A row without anything to learn yields what it has, mostly nothing.
    """
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        encoded = _encode_turns(batch, tokenizer)
        for row, turns in zip(batch, encoded, strict=True):
            if isinstance(row, TokenRow):
                tokens = np.array(row.tokens, dtype=np.int32)
                yield tokens, np.array(row.labels, dtype=np.int32) != MASKED
            else:
                yield _join(row, turns, tokenizer)


def cut(tokens: Ids, learned: Mask, context_length: int) -> tuple[Ids, Mask]:
    """Return a sequence cut to at most ``context_length`` tokens.

    The target (from the first learned token on) keeps all it has if that is at most half of the
    context, otherwise its proportional share but at least half; it is cut at its end. What is left
    goes to the prompt, which loses its middle: its head and its tail, where templates put the
    response marker, stay.
    """
    length = len(tokens)
    if length <= context_length:
        return tokens, learned
    prompt = int(learned.argmax()) if learned.any() else length
    target = length - prompt
    share = max(context_length // 2, round(context_length * target / length))
    keep_prompt = min(prompt, context_length - min(target, max(share, 1)))
    keep_target = min(target, context_length - keep_prompt)
    head = (keep_prompt + 1) // 2
    tail = keep_prompt - head
    kept = np.r_[0:head, prompt - tail : prompt + keep_target]
    return tokens[kept], learned[kept]


def _encode_turns(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast
) -> list[list[tuple[Ids, int]]]:
    """Return (token ids, number of them that are read) of every turn of every row."""
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    results: list[list[tuple[Ids, int]]] = [[] for _ in rows]
    before = backend.encode_special_tokens
    try:
        for complete in (False, True):
            owners = [
                (index, turn)
                for index, row in enumerate(rows)
                if isinstance(row, TextRow) and row.complete == complete
                for turn in row.turns
            ]
            # Text that only looks like a special token is spelled out, not obeyed.
            backend.encode_special_tokens = not complete
            encodings = backend.encode_batch(
                [read + learned for _, (read, learned) in owners], add_special_tokens=False
            )
            for (index, (read, _)), encoding in zip(owners, encodings, strict=True):
                tokens = np.array(encoding.ids, dtype=np.int32)
                results[index].append((tokens, _boundary(encoding, len(read), len(tokens))))
    finally:
        backend.encode_special_tokens = before
    return results


def _boundary(encoding: Any, character: int, length: int) -> int:
    """Return the index of the first token at or after a character, spanning ones included."""
    if character == 0:
        return 0
    token = encoding.char_to_token(character)
    if token is not None:
        return int(token)
    # No token covers it: white space, which some tokenizers leave out of the offsets.
    return next(
        (k for k, (a, b) in enumerate(encoding.offsets) if b > character or a >= character), length
    )


def _join(
    row: TextRow, turns: Sequence[tuple[Ids, int]], tokenizer: PreTrainedTokenizerFast
) -> tuple[Ids, Mask]:
    """Return a row's turns as one sequence, with its beginning and end tokens."""
    if not turns:
        return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_)
    ids: list[Ids] = []
    learned: list[Mask] = []

    def add(tokens: Ids, is_learned: bool) -> None:
        ids.append(tokens)
        learned.append(np.full(len(tokens), is_learned))

    beginning = _beginning(tokenizer)
    if not (row.complete and np.array_equal(turns[0][0][:1], beginning)):
        add(beginning, False)
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for tokens, read in turns:
        add(tokens[:read], False)
        add(tokens[read:], True)
        if not row.complete:
            add(end, True)
    return np.concatenate(ids), np.concatenate(learned)


def _beginning(tokenizer: PreTrainedTokenizerFast) -> Ids:
    """Return the beginning token if the tokenizer puts it before every text, else nothing."""
    backend: Any = tokenizer.backend_tokenizer
    first = backend.encode("", add_special_tokens=True).ids[:1]
    found = first if first and first[0] == tokenizer.bos_token_id else []
    return np.array(found, dtype=np.int32)
