"""Long texts in pieces, each of which has by itself the tokens that it has in the whole text.

What a tokenizer returns takes some 200 bytes a character: of a text of 10 MB 2 GB, of its pieces
one after another as much as of one. A text may be divided at a place that no token reaches over,
and before and behind which the tokens are those of the two parts alone. No token does where the
tokenizer sees two words, which it tokenises each by itself; nor does one where no token of the
vocabulary holds what stands there, as SentencePiece's has none with a space inside. The rest is
tried, on what stands around the place: that neither part's tokens are others for being alone (the
old normaliser of Llama 2 puts a space before every text, so it is never divided).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PIECE = 1 << 18  # characters
REACH = 1 << 12  # characters at the end of a piece among which it may end
WINDOW = 128  # characters before and behind a place that are tokenised to try it
MOST_TRIES = 8  # of places for one end

#: Behind a letter before a space and a letter, and behind the end of a line that another follows.
_PLACE = re.compile(r"[^\W\d_](?= [^\W\d_])|\S\n(?=\S)")
#: What a token that reaches over such a place holds. Vocabularies have other characters for a space
#: (SentencePiece's mark; byte-level ones have letters for tab, end of line, return and space).
_OVER_PLACE = re.compile(r"(?![ĉĊčĠ])[^\W\d_][ \u2581Ġ]|[\nĊ][^\s\u2581ĉĊčĠ]")


def divided(text: str, tokenizer: Tokenizer) -> list[str] | None:
    """Return the pieces of a text; None if no place for the end of one is found."""
    if len(text) <= PIECE:
        return [text]
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    has_tokens_over = any(map(_OVER_PLACE.search, vocabulary))
    pieces = []
    start = 0
    while len(text) - start > PIECE:
        reach = max(start, start + PIECE - REACH)
        places = [found.end() for found in _PLACE.finditer(text, reach, start + PIECE)]
        tried = reversed(places[-MOST_TRIES:])
        end = next((p for p in tried if _divides(text, p, tokenizer, has_tokens_over)), None)
        if end is None:
            return None
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _divides(text: str, place: int, tokenizer: Tokenizer, has_tokens_over: bool) -> bool:
    """Return whether what stands before and behind a place has the tokens it has as one text.

    The words that end and begin there must be seen whole.
    """
    start, end = max(0, place - WINDOW), place + WINDOW
    whole, before, behind = tokenizer.encode_batch(
        [text[start:end], text[start:place], text[place:end]], add_special_tokens=False
    )
    count = len(before.ids)
    if not 0 < count < len(whole.ids) or whole.ids != before.ids + behind.ids:
        return False
    words = whole.word_ids
    return not has_tokens_over or words[0] != words[count - 1] != words[count] != words[-1]
