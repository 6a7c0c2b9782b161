"""A format of rows: what of a row it obeys, and what a row becomes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lobra.common.errors import did_you_mean, show
from lobra.tasks.chat import ChatTemplate
from lobra.tasks.conversations import FieldError
from lobra.tasks.fields import refused_fields
from lobra.tasks.objectives import SUPERVISED
from lobra.tasks.special_tokens import SpecialTokens
from lobra.tasks.text_rows import Row

CONTRADICTION = (
    "train_on_inputs = true, but the rows say themselves what is learned (labels, masks, weight or "
    "train): remove train_on_inputs, or those"
)


@dataclass(frozen=True)
class Reading:
    """How rows are to be read.

    Attributes
    ----------
    prompt, json_key, train_on_inputs, max_rows, objective
        The settings of the task.
    vocab_size
        Token ids of tokenised rows must be below it; None where the model is not known.
    specials, chat
        The tokenizer's special tokens and chat template; called only for rows of texts.
    """

    prompt: str
    json_key: str | None
    train_on_inputs: bool
    max_rows: int | None
    vocab_size: int | None
    specials: Callable[[], SpecialTokens]
    chat: Callable[[], ChatTemplate]
    objective: str = SUPERVISED


class SettingError(ValueError):
    """A setting of the task that does not go with the data."""


class RowFormat:
    """Turns the rows of one format into texts or tokens."""

    kind = ""
    learns = ""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.num_split = self.num_parts = 0

    def parse(self, fields: Mapping[str, Any]) -> list[Row]:
        """Return what a row becomes, after refusing what would change training unseen."""
        problems = refused_fields(fields, self.used(fields), self.kind)
        if problems:
            raise FieldError("; ".join(problems))
        return self.read(fields)

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        """Return the names of the fields that the format obeys."""
        raise NotImplementedError

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        """Return what a row becomes whose fields do not change training unseen."""
        raise NotImplementedError

    def ignored(self, fields: Mapping[str, Any]) -> list[str]:
        """Return the names of the fields of the row just parsed that mean nothing here."""
        used = self.used(fields)
        return [name for name in fields if name not in used]

    def notes(self) -> list[str]:
        """Return what a user should know of all rows parsed."""
        return []


def check_first(
    first: Mapping[str, Any], objective: str, required: Sequence[str], wanted: str
) -> None:
    """Refuse a file whose first row lacks a field that rows of an objective must have."""
    if missing := [name for name in required if name not in first]:
        raise SettingError(
            f"objective = {show(objective)}: the first row has no {missing[0]}"
            f"{did_you_mean(missing[0], first)}: want rows of {wanted}"
        )
