"""Rows of a data set between reading and tokenising: texts or tokens, and what is learned."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from lobra.tasks.special_tokens import Span

#: The label of a token that is not learned.
MASKED = -100


@dataclass(frozen=True)
class TextRow:
    """A row to be tokenised as one text, its special tokens spelled out.

    Attributes
    ----------
    text
        All of it; empty where there is nothing to learn.
    learned
        Its parts that are learned, ascending.
    verbatim
        Its parts in which what spells a special token is characters.
    begins
        Whether the beginning token comes first, for tokenizers that put it before every text.
    sign
        Of an answer among others: 1 if it is wanted, -1 if not; else 0.
    """

    text: str
    learned: tuple[Span, ...]
    verbatim: tuple[Span, ...] = ()
    begins: bool = True
    sign: int = 0


@dataclass(frozen=True)
class TokenRow:
    """A row that is tokenised already; ``labels[k]`` is ``tokens[k]`` or -100.

    Of sampled tokens `logprobs` and `advantages` are those of each token, 0 where not learned.
    """

    tokens: list[int]
    labels: list[int]
    logprobs: list[float] | None = None
    advantages: list[float] | None = None


Row = TextRow | TokenRow

NOTHING = TextRow("", ())  # to learn


def replace_spans(
    text: str, edits: Sequence[tuple[Span, str]], spans: Sequence[Span]
) -> tuple[str, list[Span]]:
    """Return the text with some of its spans replaced, and where other spans of it are then.

    ``edits`` are ascending and do not overlap; ``spans`` begin and end outside of them or at their
    ends.
    """
    pieces: list[str] = []
    places, shifts = [0], [0]  # from places[k] of the old text on, shifts[k] further right
    done = 0
    for (start, end), new in edits:
        pieces += [text[done:start], new]
        done = end
        places.append(end)
        shifts.append(shifts[-1] + len(new) - (end - start))
    pieces.append(text[done:])

    def move(place: int) -> int:
        return place + shifts[bisect_right(places, place) - 1]

    return "".join(pieces), [(move(start), move(end)) for start, end in spans]
