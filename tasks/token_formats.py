"""Rows that are tokens already: to be learned as labels or masks say, or as they were sampled."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lobra.tasks.fields import ROLLOUT_FIELDS, TOKEN_FIELDS
from lobra.tasks.row_format import CONTRADICTION, Reading, RowFormat, SettingError, check_first
from lobra.tasks.text_rows import Row
from lobra.tasks.token_rows import parse_rollout, parse_tokens


class Tokens(RowFormat):
    """Rows of ids, and of what is learned of them."""

    kind = "tokens"
    learns = "the tokens that labels or masks say, all where there are none"

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return TOKEN_FIELDS

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        row, is_marked = parse_tokens(fields, self.reading.vocab_size)
        if is_marked and self.reading.train_on_inputs:
            raise SettingError(CONTRADICTION)
        return [row]


class Rollouts(RowFormat):
    """Rows of a prompt and a completion that was sampled, and how good it was."""

    kind = "rollout"
    learns = "completion_ids, by their advantages"

    def __init__(self, reading: Reading, first: Mapping[str, Any]) -> None:
        super().__init__(reading)
        check_first(first, reading.objective, ROLLOUT_FIELDS, ", ".join(ROLLOUT_FIELDS))

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return ROLLOUT_FIELDS

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        return [parse_rollout(fields, self.reading.vocab_size)]
