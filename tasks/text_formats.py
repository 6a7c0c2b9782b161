"""Rows that are texts: one, a prompt and its completion, or an instruction and its answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lobra.common.errors import did_you_mean, show
from lobra.tasks.conversations import FieldError, encodable
from lobra.tasks.fields import INPUT, INSTRUCTION, OUTPUT
from lobra.tasks.prompts import ALPACA, Piece, parse_template
from lobra.tasks.row_format import Reading, RowFormat
from lobra.tasks.special_tokens import Span, SpecialTokens
from lobra.tasks.text_rows import NOTHING, Row, TextRow


class Texts(RowFormat):
    """Rows that are one text, or a prompt and its completion."""

    def __init__(self, reading: Reading, prompts: Sequence[str], target: str) -> None:
        super().__init__(reading)
        self.kind = "completion" if prompts else "text"
        self.learns = f"{target} and its end" + (", after prompt" if prompts else "")
        self._prompts = prompts
        self._target = target
        self._num_rendered = 0
        self._num_rows = 0

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return (*self._prompts, self._target)

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        prompt = "".join(_text_field(fields, (name,)) for name in self._prompts)
        target = _text_field(fields, (self._target,))
        specials = self.reading.specials()
        self._num_rows += 1
        # What a chat template wrote is obeyed; markup that happens to be spelled alike is not.
        is_field = not specials.is_rendered_chat(prompt + target)
        self._num_rendered += not is_field
        pieces = [Piece(prompt, False, is_field), Piece(target, True, is_field)]
        return _assembled(pieces, specials, self.reading.train_on_inputs)

    def notes(self) -> list[str]:
        notes = []
        if self._prompts and self.reading.prompt == "auto":
            notes.append(
                "prompt and completion are joined as they are (until version 0.1 they went through "
                "the Alpaca prompt: prompt: alpaca still does that)"
            )
        if self._num_rendered:
            notes.append(
                f"special tokens are obeyed in {self._num_rendered} of {self._num_rows} rows, "
                "which spell them as a rendered chat does"
            )
        return notes


class Instructions(RowFormat):
    """Rows of an instruction and its answer, read in a prompt."""

    kind = "instruction"

    def __init__(self, reading: Reading, first: Mapping[str, Any]) -> None:
        super().__init__(reading)
        instruction, output = (present(first, names) for names in (INSTRUCTION, OUTPUT))
        template = "Alpaca prompt" if reading.prompt in ("auto", "alpaca") else "task's prompt"
        self.learns = f"{output} and its end, after {instruction} in the {template}"
        self._template = ALPACA if reading.prompt == "auto" else parse_template(reading.prompt)

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        pieces = self._template.pieces(*instruction_fields(fields))
        return _assembled(pieces, self.reading.specials(), self.reading.train_on_inputs)

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return instruction_columns(fields)

    def notes(self) -> list[str]:
        if self.reading.prompt != "auto" or self.reading.chat().is_own:
            return []
        return ["the model's chat template is not used for these rows; prompt: chat would use it"]


def _assembled(
    pieces: Sequence[Piece], specials: SpecialTokens, learn_all: bool = False
) -> list[Row]:
    """Return pieces as one text; the end token follows unless the last piece spells one."""
    if not any(piece.text.strip() for piece in pieces if piece.is_learned or learn_all):
        return [NOTHING]
    text = ""
    learned: list[Span] = []
    verbatim: list[Span] = []
    for piece in pieces:
        span = (len(text), len(text) + len(piece.text))
        text += piece.text
        if piece.is_learned:
            learned = [(learned[0][0] if learned else span[0], span[1])]
        if piece.is_field:
            verbatim.append(span)
    is_ended = not pieces[-1].is_field and specials.is_ended(text)
    if not is_ended:
        text += specials.end
    # White space after an end token that the last piece spells is not learned.
    end = len(text.rstrip()) if is_ended else len(text)
    learned = [(0 if learn_all else learned[0][0], end)]
    begun = specials.beginning is not None and text.startswith(specials.beginning)
    return [TextRow(text, tuple(learned), tuple(verbatim), begins=not begun or pieces[0].is_field)]


def instruction_fields(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return (instruction, input, output) of a row, under whatever names it has them."""
    instruction = _text_field(row, INSTRUCTION)
    output = _text_field(row, OUTPUT)
    name = _given_input(row)
    return instruction, _text_field(row, (name,)) if name else "", output


def instruction_columns(row: Mapping[str, Any]) -> set[str]:
    """Return the names that the three have there."""
    found = (present(row, INSTRUCTION), _given_input(row), present(row, OUTPUT))
    return {name for name in found if name is not None}


def _given_input(row: Mapping[str, Any]) -> str | None:
    """Return the name of the field that holds the input: the first that is not empty, if any."""
    names = [name for name in INPUT if name in row]
    return next((name for name in names if row[name]), names[0] if names else None)


def present(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of these names that a row has, if any."""
    return next((name for name in names if name in row), None)


def _text_field(row: Mapping[str, Any], names: Sequence[str]) -> str:
    name = present(row, names)
    if name is None:
        raise FieldError(f"{names[0]}: is missing{did_you_mean(names[0], row)}, want a text")
    value = row[name]
    if not isinstance(value, str):
        raise FieldError(f"{name} = {show(value)}: want a text")
    return encodable(value, name)
