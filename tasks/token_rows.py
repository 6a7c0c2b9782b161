"""Rows that are tokenised already: their ids, what is learned of them, their padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lobra.common.errors import show
from lobra.tasks.conversations import FieldError
from lobra.tasks.fields import MASKS, ROLLOUT_FIELDS
from lobra.tasks.text_rows import MASKED, TokenRow

_LARGEST = 2**31 - 1
_MOST = 1e30  # of a number that losses are multiplied by in float32


def parse_tokens(row: Mapping[str, Any], vocab_size: int | None) -> tuple[TokenRow, bool]:
    """Return a row of ``input_ids``, without its padding, and whether it says what is learned.

    ``labels`` (the id or -100) and masks of 0 and 1 say what is learned: where there are several,
    what all of them say (as TRL has it), without any, all. Where ``attention_mask`` is 0 is
    padding, which may be on either side. ``position_ids`` must count the tokens.

    Raises
    ------
    FieldError
        Naming the field that is wrong.
    """
    tokens = row.get("input_ids")
    if tokens is None:
        raise FieldError("input_ids: is missing, want a list of token ids")
    last = _LARGEST if vocab_size is None else vocab_size - 1
    _check_integers(tokens, "input_ids", 0, last, f"a token id from 0 to {last}")
    is_marked = False
    labels = row.get("labels")
    if labels is None:
        labels = tokens
    else:
        is_marked = True
        _check_integers(labels, "labels", MASKED, last, f"a token id from 0 to {last}, or -100")
        _check_length(labels, "labels", tokens)
    for index, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label not in (token, MASKED):
            raise FieldError(
                f"labels[{index}] = {label}: want {token}, the id at the same place of input_ids "
                "(the shift by one is the model's), or -100 where nothing is learned"
            )
    for name in MASKS:
        if row.get(name) is not None:
            is_marked = True
            mask = _mask(row[name], name, tokens)
            labels = [label if keep else MASKED for label, keep in zip(labels, mask, strict=True)]
    begin, end = _extent(row, tokens)
    _check_positions(row.get("position_ids"), begin, end, len(tokens))
    return TokenRow(tokens[begin:end], labels[begin:end]), is_marked


def parse_rollout(row: Mapping[str, Any], vocab_size: int | None) -> TokenRow:
    """Return a row of ``prompt_ids`` and ``completion_ids``, of which the latter were sampled.

    ``logprobs`` are those of the completion's tokens when they were; ``advantages`` one number of
    the completion, or one of each token.

    Raises
    ------
    FieldError
        Naming the field that is wrong.
    """
    missing = [name for name in ROLLOUT_FIELDS if row.get(name) is None]
    if missing:
        raise FieldError(f"{missing[0]}: is missing, want rows of {', '.join(ROLLOUT_FIELDS)}")
    prompt, completion, logprobs, advantages = (row[name] for name in ROLLOUT_FIELDS)
    last = _LARGEST if vocab_size is None else vocab_size - 1
    for name, ids in (("prompt_ids", prompt), ("completion_ids", completion)):
        _check_integers(ids, name, 0, last, f"a token id from 0 to {last}")
    if not prompt:
        raise FieldError("prompt_ids: is empty, want a token before the first that was sampled")
    if not isinstance(advantages, list):
        advantages = [advantages] * len(completion)
    for name, values in (("logprobs", logprobs), ("advantages", advantages)):
        _check_numbers(values, name)
        _check_length(values, name, completion, "completion_ids")
    if (largest := max(logprobs, default=0.0)) > 0:
        place = logprobs.index(largest)
        raise FieldError(f"logprobs[{place}] = {largest}: want at most 0, the log of a probability")
    rest = [0.0] * len(prompt)
    return TokenRow(
        [*prompt, *completion],
        [MASKED] * len(prompt) + completion,
        rest + logprobs,
        rest + advantages,
    )


def _extent(row: Mapping[str, Any], tokens: Sequence[int]) -> tuple[int, int]:
    """Return where what is no padding begins and ends."""
    value = row.get("attention_mask")
    if value is None:
        return 0, len(tokens)
    mask = _mask(value, "attention_mask", tokens)
    if 1 not in mask:
        return 0, 0
    begin, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[begin:end]:
        raise FieldError(
            "attention_mask: has zeros between ones; padding is at one end, and packed rows are "
            "not read: give one sequence a row"
        )
    return begin, end


def _check_positions(value: Any, begin: int, end: int, length: int) -> None:
    if value is None:
        return
    good = isinstance(value, list) and len(value) == length
    if not good or list(value[begin:end]) not in (
        list(range(end - begin)),
        list(range(begin, end)),
    ):
        raise FieldError(
            "position_ids: do not count the tokens of one sequence from 0; other positions are "
            "not supported, and packed rows are not read: give one sequence a row"
        )


def _mask(value: Any, name: str, tokens: Sequence[int]) -> list[int]:
    if isinstance(value, list):
        value = [int(entry) if isinstance(entry, bool) else entry for entry in value]
    _check_integers(value, name, 0, 1, "0 or 1")
    _check_length(value, name, tokens)
    return list(value)


def _check_integers(values: Any, name: str, least: int, most: int, wanted: str) -> None:
    if not isinstance(values, list):
        raise FieldError(f"{name} = {show(values)}: want a list of integers")
    for index, value in enumerate(values):
        good = isinstance(value, int) and not isinstance(value, bool)
        if not good or not least <= value <= most:
            raise FieldError(f"{name}[{index}] = {show(value)}: want {wanted}")


def _check_numbers(values: Any, name: str) -> None:
    if not isinstance(values, list):
        raise FieldError(f"{name} = {show(values)}: want a list of numbers")
    for index, value in enumerate(values):
        if type(value) not in (int, float) or not abs(value) <= _MOST:
            raise FieldError(
                f"{name}[{index}] = {show(value)}: want a finite number, at most {_MOST:g}"
            )


def _check_length(
    values: Sequence[Any], name: str, tokens: Sequence[int], of: str = "input_ids"
) -> None:
    if len(values) != len(tokens):
        raise FieldError(f"{name}: are {len(values)}, want one for each of {len(tokens)} {of}")
