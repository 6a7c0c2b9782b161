"""From rendered rows to token ids and what of them is learned, cut to the context length.

A row is tokenised once, as one text, and what is learned is found from the characters: a token
that spans a boundary counts as learned. Where a part of a text may not be obeyed (what a person
wrote into a field) but spells a special token, the text is tokenised by a twin of the tokenizer
whose special tokens have other, secret spellings: those that the template wrote are replaced by
them, the person's stay what they are, characters.
"""

from __future__ import annotations

import json
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property, partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lobra.tasks.pieces import divided
from lobra.tasks.special_tokens import Span, SpecialTokens
from lobra.tasks.text_rows import TextRow, replace_spans

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

LONG_TEXT = 1 << 20  # characters: what a tokenizer returns for them takes 200 MB
_SECRET = secrets.token_hex(8)  # no data can spell it


class Encoded(NamedTuple):
    """A tokenised row.

    Attributes
    ----------
    tokens, learned
        int32 [length]; which of them are learned, bool [length].
    is_spelled
        Whether a person's text spelled a special token in it, which is characters.
    """

    tokens: Ids
    learned: Mask
    is_spelled: bool


class Encoder:
    """A tokenizer's own text-to-ids, with offsets into the text and without side effects on it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, specials: SpecialTokens) -> None:
        self._specials = specials
        self._beginning = np.array(
            [tokenizer.bos_token_id] if specials.is_begun else [], dtype=np.int32
        )
        #: The ids of the special tokens.
        self.special_ids = set(tokenizer.convert_tokens_to_ids(list(specials.spellings)))
        document = json.loads(tokenizer.backend_tokenizer.to_str())
        # Ids do not depend on these; offsets do, and a text is never cut or padded here.
        document.update(post_processor=None, truncation=None, padding=None)
        self._document = document

    def encode(self, rows: Sequence[TextRow]) -> list[Encoded]:
        """Return every row's tokens.

        The beginning token is put before a text that wants it if the tokenizer itself does so. A
        row without text has no tokens. A long text is tokenised in pieces where that is the same.
        """
        resolved = [self._resolve(row) for row in rows]
        found: dict[int, tuple[Ids, Mask]] = {}
        for is_twin in (False, True):
            tokenizer = partial(self._backend, is_twin)
            chosen = [k for k, (_, _, needs_twin) in enumerate(resolved) if needs_twin is is_twin]
            short = [k for k in chosen if len(resolved[k][0]) <= LONG_TEXT]
            if short:
                texts = [resolved[k][0] for k in short]
                encodings = tokenizer().encode_batch(texts, add_special_tokens=False)
                for k, encoding in zip(short, encodings, strict=True):
                    found[k] = self._marked(encoding, resolved[k][1])
            for k in set(chosen) - set(short):
                found[k] = self._in_pieces(tokenizer(), resolved[k][0], resolved[k][1])
        return [Encoded(*self._begun(row, *found[k]), resolved[k][2]) for k, row in enumerate(rows)]

    def divides(self, row: TextRow) -> bool:
        """Return whether a long row is tokenised in pieces, in bounded memory."""
        text, _, is_twin = self._resolve(row)
        return divided(text, self._backend(is_twin)) is not None

    def _backend(self, is_twin: bool) -> Tokenizer:
        return self._twin if is_twin else self._own

    def _resolve(self, row: TextRow) -> tuple[str, Sequence[Span], bool]:
        """Return (text, what is learned of it, whether the twin must tokenise it)."""
        if not row.verbatim:
            return row.text, row.learned, False
        spelled = self._specials.find(row.text)
        edits = []
        parts = iter(row.verbatim)  # both ascend
        part = next(parts, None)
        for start, end in spelled:
            while part is not None and part[1] <= start:
                part = next(parts, None)
            if part is None or part[0] >= end:
                edits.append(((start, end), self._aliases[row.text[start:end]]))
        if len(edits) == len(spelled):
            return row.text, row.learned, False
        text, learned = replace_spans(row.text, edits, row.learned)
        return text, learned, True

    def _in_pieces(
        self, tokenizer: Tokenizer, text: str, learned_spans: Sequence[Span]
    ) -> tuple[Ids, Mask]:
        """Return the tokens of a long text, and which are learned, piece by piece."""
        found = []
        begin = 0
        for piece in divided(text, tokenizer) or [text]:
            spans = [
                (max(start - begin, 0), min(end - begin, len(piece)))
                for start, end in learned_spans
                if start < begin + len(piece) and end > begin
            ]
            found.append(self._marked(tokenizer.encode(piece, add_special_tokens=False), spans))
            begin += len(piece)
        tokens, learned = zip(*found, strict=True)
        return np.concatenate(tokens), np.concatenate(learned)

    def _marked(self, encoding: Any, learned_spans: Sequence[Span]) -> tuple[Ids, Mask]:
        """Return an encoding's tokens, and which are learned."""
        tokens = np.array(encoding.ids, dtype=np.int32)
        learned = np.zeros(len(tokens), dtype=np.bool_)
        offsets = encoding.offsets  # ascending
        for start, end in learned_spans:
            # From the first token that reaches into the span or begins in it (tokens of no
            # character of the text, marks before a word, go with what follows).
            first = min(
                bisect_right(offsets, start, key=itemgetter(1)),
                bisect_left(offsets, start, key=itemgetter(0)),
            )
            last = bisect_left(offsets, end, key=itemgetter(0))
            # Some special tokens take the white space that follows them; they are no part of it.
            if first < last and offsets[first][0] < start and tokens[first] in self.special_ids:
                first += 1
            learned[first:last] = True
        return tokens, learned

    def _begun(self, row: TextRow, tokens: Ids, learned: Mask) -> tuple[Ids, Mask]:
        """Return a row's tokens with the beginning token, if it wants one; none without text."""
        if not row.text:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_)
        if row.begins and not np.array_equal(tokens[:1], self._beginning):
            tokens = np.concatenate([self._beginning, tokens])
            learned = np.concatenate([np.zeros(len(self._beginning), dtype=np.bool_), learned])
        return tokens, learned

    @cached_property
    def _own(self) -> Tokenizer:
        return _tokenizer(self._document)

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {
            spelling: f"\U00100000{_SECRET}.{number}\U00100001"
            for number, spelling in enumerate(self._specials.spellings)
        }

    @cached_property
    def _twin(self) -> Tokenizer:
        aliases = self._aliases
        added = [
            {**token, "content": aliases.get(token["content"], token["content"])}
            for token in self._document["added_tokens"]
        ]
        model = dict(self._document["model"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {aliases.get(token, token): i for token, i in model["vocab"].items()}
        else:
            model["vocab"] = [[aliases.get(token, token), x] for token, x in model["vocab"]]
        if model.get("unk_token") in aliases:
            model["unk_token"] = aliases[model["unk_token"]]
        return _tokenizer({**self._document, "added_tokens": added, "model": model})


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


def _tokenizer(document: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(document))
