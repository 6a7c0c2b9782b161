"""The grid of a time profile: few micro-batch shapes (b, s), placed where a plan will use them."""

from __future__ import annotations

SHORTEST = 64
# Per length: a single sequence, and micro-batches of these shares of the most tokens.
TOKEN_SHARES = (1 / 16, 1 / 4, 1)


QUICK_TOKEN_SHARES = (1 / 4, 1)


def time_grid(
    max_seq_length: int, max_tokens: int | None = None, quick: bool = False
) -> tuple[tuple[int, int], ...]:
    """Return the (b, s) to measure, cheapest first.

    Lengths double from 64 up to ``max_seq_length`` (which is always one of them). For each length
    b is 1 and what fills a sixteenth, a quarter and all of ``max_tokens`` (by default as many as
    the longest sequence): a plan fills its micro-batches, and b = 1 separates what depends on the
    length from what depends on the tokens. ``quick``: lengths quartered from the
    longest down, no sixteenths; six shapes up to 2,048 tokens.

    Raises
    ------
    ValueError
        If ``max_seq_length`` or ``max_tokens`` is less than 1.
    """
    max_tokens = max_seq_length if max_tokens is None else max_tokens
    if max_seq_length < 1 or max_tokens < 1:
        raise ValueError(f"no micro-batch of at most {max_tokens} tokens of {max_seq_length}")
    lengths = [max_seq_length]
    if quick:
        while lengths[-1] // 4 >= SHORTEST:
            lengths.append(lengths[-1] // 4)
    else:
        length = SHORTEST
        while length < max_seq_length:
            lengths.append(length)
            length *= 2
    shares = QUICK_TOKEN_SHARES if quick else TOKEN_SHARES
    shapes = {(1, s) for s in lengths}
    shapes |= {(int(share * max_tokens) // s, s) for s in lengths for share in shares}
    return tuple(sorted(((b, s) for b, s in shapes if b > 0), key=lambda p: (p[0] * p[1], p[1])))
