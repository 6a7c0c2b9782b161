"""Rows of answers that objectives compare: each is read as a row of a prompt and a completion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lobra.common.errors import did_you_mean, show
from lobra.tasks.conversations import SETTINGS, FieldError
from lobra.tasks.objectives import CIT, KTO, PAIRED, SUPERVISED
from lobra.tasks.row_format import Reading, RowFormat, check_first
from lobra.tasks.text_rows import Row, TextRow


class _AnswerRows(NamedTuple):
    """A format of answers: each is read from a field of its own, after a prompt, or is of one."""

    kind: str
    learns: str
    answers: tuple[str, ...]
    required: tuple[str, ...]
    fields: str


_PREFERENCES = _AnswerRows(
    "preference",
    "chosen rather than rejected, after prompt",
    ("chosen", "rejected"),
    ("chosen", "rejected"),
    "prompt, chosen and rejected",
)
_LABELLED = _AnswerRows(
    "labelled completion",
    "label of completion, after prompt",
    ("completion",),
    ("completion",),
    "prompt, completion and label",
)
_PARAPHRASES = _AnswerRows(
    "paraphrase",
    "completion, after prompt and after paraphrase",
    ("prompt", "paraphrase"),
    ("prompt", "paraphrase", "completion"),
    "prompt, paraphrase and completion",
)
_ANSWER_ROWS = {**dict.fromkeys(PAIRED, _PREFERENCES), KTO: _LABELLED, CIT: _PARAPHRASES}


class Answers(RowFormat):
    """Rows of a prompt and a completion that is wanted or not, or a chosen and a rejected one.

    Or of two wordings of a prompt and the completion of both.
    """

    def __init__(
        self,
        reading: Reading,
        first: Mapping[str, Any],
        format_of: Callable[[Mapping[str, Any], Reading], RowFormat],
    ) -> None:
        """Read answers in the format that `format_of` returns for the first of them."""
        super().__init__(reading)
        self._rows = _ANSWER_ROWS[reading.objective]
        self.kind, self.learns = self._rows.kind, self._rows.learns
        check_first(first, reading.objective, self._rows.required, self._rows.fields)
        completion, _ = self._completions(first)[0]
        self._format = format_of(completion, replace(reading, objective=SUPERVISED))

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        label = ("label",) if self._rows is _LABELLED else ()
        settings = SETTINGS if self._format.kind == "chat" else ()
        return {"prompt", *self._rows.required, *label, *settings}

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        rows = []
        answers = zip(self._completions(fields), self._rows.answers, strict=True)
        for (completion, sign), name in answers:
            made = self._format.parse(completion)
            if len(made) != 1:
                raise FieldError(
                    f"{name}: becomes {len(made)} sequences, since the chat template writes "
                    "earlier turns differently once it goes on: want one answer"
                )
            assert isinstance(made[0], TextRow), "completions are texts"
            rows.append(replace(made[0], sign=sign))
        return [*rows]

    def notes(self) -> list[str]:
        return self._format.notes()

    def _completions(self, fields: Mapping[str, Any]) -> list[tuple[dict[str, Any], int]]:
        """Return every answer as a row of prompt and completion, with its sign."""
        missing = [name for name in self._rows.required if name not in fields]
        if missing:
            raise FieldError(f"{missing[0]}: is missing{did_you_mean(missing[0], fields)}")
        rest = {name: value for name, value in fields.items() if name in SETTINGS}
        if self._rows is _PARAPHRASES:
            return [
                ({**rest, "prompt": fields[name], "completion": fields["completion"]}, 1)
                for name in self._rows.answers
            ]
        if self._rows is _LABELLED:
            if not isinstance(fields.get("label"), bool):
                raise FieldError(f"label = {show(fields.get('label'))}: want true or false")
            if "prompt" not in fields:
                raise FieldError("prompt: is missing, want a text or messages")
            row = {**rest, "prompt": fields["prompt"], "completion": fields["completion"]}
            return [(row, 1 if fields["label"] else -1)]
        prompt, answers = _with_prompt(fields)
        return [
            ({**rest, "prompt": prompt, "completion": answer}, sign)
            for answer, sign in zip(answers, (1, -1), strict=True)
        ]


def _with_prompt(fields: Mapping[str, Any]) -> tuple[Any, tuple[Any, Any]]:
    """Return (prompt, (chosen, rejected)); without a prompt it is what both answers begin with."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if "prompt" in fields:
        return fields["prompt"], (chosen, rejected)
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise FieldError("chosen and rejected: want two texts, or two lists of messages")
    pairs = zip(chosen, rejected, strict=False)
    size = next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str) and chosen[:size].endswith(" "):
        size -= 1  # tokens of words begin with their space
    return chosen[:size], (chosen[size:], rejected[size:])
