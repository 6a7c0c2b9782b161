"""The special tokens of a tokenizer: which spellings in a text are control tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

#: Characters [start, end) of a text.
Span = tuple[int, int]


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer says of its special tokens, whatever its configuration files name.

    Attributes
    ----------
    spellings
        Every special token as a text spells it, longest first.
    end
        The end-of-sequence token.
    beginning
        The beginning-of-sequence token, None if there is none.
    is_begun
        Whether the tokenizer itself puts the beginning token before every text.
    usual
        Those that a text about markup may spell without being a rendered chat: beginning, end,
        padding and unknown token.
    """

    spellings: tuple[str, ...]
    end: str
    beginning: str | None
    is_begun: bool
    usual: frozenset[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> SpecialTokens:
        """Return the special tokens of a tokenizer."""
        named = set(tokenizer.all_special_tokens)
        spellings = {
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.content and (token.special or token.content in named)
        }
        first = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids[:1]
        usual = (
            tokenizer.bos_token,
            tokenizer.eos_token,
            tokenizer.pad_token,
            tokenizer.unk_token,
        )
        return cls(
            spellings=tuple(sorted(spellings, key=lambda token: (-len(token), token))),
            end=str(tokenizer.eos_token),
            beginning=tokenizer.bos_token or None,
            is_begun=bool(first) and first[0] == tokenizer.bos_token_id,
            usual=frozenset(token for token in usual if token),
        )

    def find(self, text: str) -> list[Span]:
        """Return where a text spells special tokens, left to right, without overlaps."""
        pattern = _pattern(self.spellings)
        return [match.span() for match in pattern.finditer(text)] if pattern else []

    def is_ended(self, text: str) -> bool:
        """Return whether a text, white space aside, ends with a special token."""
        return text.rstrip().endswith(self.spellings)

    def is_rendered_chat(self, text: str) -> bool:
        """Return whether a text was written by a chat template, or with its ends spelled out.

        That is: it spells a special token that only a conversation has; or it begins with the
        beginning token or ends with the end token, and the beginning token is nowhere but at the
        beginning and after an end token (as it would be in HTML, whose ``<s>`` strikes out).
        """
        body = text.strip()
        spans = self.find(body)
        if any(body[start:end] not in self.usual for start, end in spans):
            return True
        for start, end in spans:
            if body[start:end] == self.beginning != self.end:
                before = body[:start].rstrip()
                if before and not before.endswith(self.end):
                    return False
        begins = self.beginning is not None and body.startswith(self.beginning)
        return begins or body.endswith(self.end)


@cache
def _pattern(spellings: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, spellings))) if spellings else None
