"""The formats of rows: what each obeys, and how it becomes what is read and what is learned.

Formats of supervised tasks, recognised by the fields of the first row:

=============  ====================================================================
tokens         ``input_ids``; what is learned by ``labels`` or a mask, else all
chat           ``messages``, or ShareGPT's ``conversations``
completion     ``prompt`` and ``completion`` and no field of an instruction
instruction    ``instruction``, ``output`` and perhaps ``input``, or their other names
text           the field ``json_key`` (``text``): all of it is learned
=============  ====================================================================

Objectives that compare answers have rows of ``chosen`` and ``rejected``, or of ``completion`` and
``label``, after a ``prompt``: each answer is read as a row of prompt and completion; so is each of
``prompt`` and ``paraphrase`` with its ``completion``. ``ppo`` has rows of tokens that were sampled,
with their advantages.

A ``json_key`` other than ``text`` that the first row has makes the format ``text``. ``text``
does not, as LobRA's files give it whatever the data; rows with both are refused. Fields are a
closed list: those of the format are obeyed, those known to change training are refused
(`tasks.fields`), all others are named once and ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lobra.common.errors import did_you_mean, show
from lobra.tasks.chat import ChatTemplate
from lobra.tasks.chat_reading import left_out, quotes_arguments
from lobra.tasks.conversations import (
    SETTINGS,
    Conversation,
    FieldError,
    conversation_of_completion,
    conversation_of_instruction,
    conversation_of_messages,
    encodable,
)
from lobra.tasks.fields import (
    INPUT,
    INSTRUCTION,
    OUTPUT,
    ROLLOUT_FIELDS,
    TOKEN_FIELDS,
    refused_fields,
)
from lobra.tasks.objectives import CIT, KTO, PAIRED, PPO, SUPERVISED
from lobra.tasks.prompts import ALPACA, Piece, parse_template
from lobra.tasks.special_tokens import Span, SpecialTokens
from lobra.tasks.text_rows import Row, TextRow
from lobra.tasks.token_rows import parse_rollout, parse_tokens

_FITTING_PROMPTS = {
    "tokens": ("auto",),
    "rollout": ("auto",),
    "chat": ("auto", "chat"),
    "text": ("auto", "plain"),
    "completion": ("auto", "plain", "chat", "alpaca"),
}


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
        raise NotImplementedError

    def ignored(self, fields: Mapping[str, Any]) -> list[str]:
        """Return the names of the fields of the row just parsed that mean nothing here."""
        used = self.used(fields)
        return [name for name in fields if name not in used]

    def notes(self) -> list[str]:
        """Return what a user should know of all rows parsed."""
        return []


class _Tokens(RowFormat):
    kind = "tokens"
    learns = "the tokens that labels or masks say, all where there are none"

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return TOKEN_FIELDS

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        row, is_marked = parse_tokens(fields, self.reading.vocab_size)
        if is_marked and self.reading.train_on_inputs:
            raise SettingError(_CONTRADICTION)
        return [row]


class _Rollouts(RowFormat):
    """Rows of a prompt and a completion that was sampled, and how good it was."""

    kind = "rollout"
    learns = "completion_ids, by their advantages"

    def __init__(self, reading: Reading, first: Mapping[str, Any]) -> None:
        super().__init__(reading)
        _check_first(first, reading.objective, ROLLOUT_FIELDS, ", ".join(ROLLOUT_FIELDS))

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return ROLLOUT_FIELDS

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        return [parse_rollout(fields, self.reading.vocab_size)]


class _Texts(RowFormat):
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


class _Instructions(RowFormat):
    kind = "instruction"

    def __init__(self, reading: Reading, first: Mapping[str, Any]) -> None:
        super().__init__(reading)
        instruction, output = (_present(first, names) for names in (INSTRUCTION, OUTPUT))
        template = "Alpaca prompt" if reading.prompt in ("auto", "alpaca") else "task's prompt"
        self.learns = f"{output} and its end, after {instruction} in the {template}"
        self._template = ALPACA if reading.prompt == "auto" else parse_template(reading.prompt)

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        pieces = self._template.pieces(*_instruction_fields(fields))
        return _assembled(pieces, self.reading.specials(), self.reading.train_on_inputs)

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return _instruction_columns(fields)

    def notes(self) -> list[str]:
        if self.reading.prompt != "auto" or self.reading.chat().is_own:
            return []
        return ["the model's chat template is not used for these rows; prompt: chat would use it"]


class _Chats(RowFormat):
    """Rows that are conversations, in any of the spellings."""

    kind = "chat"
    learns = "what the assistant says and its end of turn"

    def __init__(
        self,
        reading: Reading,
        make: Callable[[Mapping[str, Any]], Conversation],
        columns: Callable[[Mapping[str, Any]], Collection[str]],
    ) -> None:
        super().__init__(reading)
        self._make = make
        self._columns = columns
        self._ignored: list[str] = []
        self._left_out: list[str] = []  # what was, a line each
        self._num_quoted = 0

    def used(self, fields: Mapping[str, Any]) -> Collection[str]:
        return {*self._columns(fields), *SETTINGS}

    def read(self, fields: Mapping[str, Any]) -> list[Row]:
        conversation = self._make(fields)
        learn_all = self.reading.train_on_inputs
        if learn_all and conversation.is_marked:
            raise SettingError(_CONTRADICTION)
        chat = self.reading.chat()
        self._ignored = chat.ignored_fields(conversation)
        rows = chat.rows(conversation, learn_all)
        self._left_out += left_out(conversation, rows, learn_all)
        self._num_quoted += quotes_arguments(conversation, rows)
        return [*rows] or [_EMPTY]

    def ignored(self, fields: Mapping[str, Any]) -> list[str]:
        return [*super().ignored(fields), *self._ignored]

    def notes(self) -> list[str]:
        notes = []
        if self.reading.chat().is_own:
            notes.append(
                "the tokenizer has no chat template: turns are written as <|role|>, a line end "
                "and the content"
            )
        if self._left_out:
            notes.append(
                f"the chat template leaves out what {len(self._left_out)} messages say, in whole "
                f"or in part, such as {self._left_out[0]}"
            )
        if self._num_quoted:
            notes.append(
                f"{self._num_quoted} conversations give the arguments of tool calls as text, which "
                "the chat template quotes once more; give them as objects if that is not meant"
            )
        if self.num_split:
            notes.append(
                f"{self.num_split} conversations have become {self.num_parts} sequences, mostly "
                "one a turn: the chat template writes earlier turns differently once it goes on"
            )
        return notes


_CONTRADICTION = (
    "train_on_inputs = true, but the rows say themselves what is learned (labels, masks, weight or "
    "train): remove train_on_inputs, or those"
)
_EMPTY = TextRow("", ())


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


class _Answers(RowFormat):
    """Rows of a prompt and a completion that is wanted or not, or a chosen and a rejected one.

    Or of two wordings of a prompt and the completion of both.
    """

    def __init__(self, reading: Reading, first: Mapping[str, Any]) -> None:
        super().__init__(reading)
        self._rows = _ANSWER_ROWS[reading.objective]
        self.kind, self.learns = self._rows.kind, self._rows.learns
        _check_first(first, reading.objective, self._rows.required, self._rows.fields)
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


def format_of(fields: Mapping[str, Any], reading: Reading) -> RowFormat:
    """Return the parser of a file whose first row has these fields."""
    if reading.objective == PPO:
        _check_prompt(reading.prompt, _Rollouts.kind)
        return _Rollouts(reading, fields)
    if reading.objective != SUPERVISED:
        return _Answers(reading, fields)
    json_key = reading.json_key or "text"
    kind, column = _kind_of(fields, json_key)
    if json_key not in ("text", *fields):
        raise SettingError(
            f"json_key = {show(json_key)}: the first row has no such field"
            f"{did_you_mean(json_key, fields)}; its fields are {', '.join(fields)}"
        )
    if reading.json_key == "text" and "text" in fields and kind != "text":
        raise SettingError(
            f'json_key = "text": the first row has this field, but {column}, too, by which it is '
            f"of the format {kind!r}: remove json_key, or the fields that are not to be read"
        )
    if kind == "completion" and isinstance(fields[column], list):
        kind = "chat"
    prompt = reading.prompt
    _check_prompt(prompt, kind)
    if kind == "tokens":
        return _Tokens(reading)
    if kind == "text":
        return _Texts(reading, (), column)
    if kind == "chat" and column == "completion":
        return _Chats(reading, conversation_of_completion, lambda _: ("prompt", "completion"))
    if kind == "chat":
        return _Chats(
            reading, lambda row: conversation_of_messages(row, column), lambda _: (column,)
        )
    if kind == "completion" and prompt in ("auto", "plain"):
        return _Texts(reading, ("prompt",), "completion")
    if prompt == "chat":
        return _Chats(
            reading,
            lambda row: conversation_of_instruction(row, *_instruction_fields(row)),
            lambda row: {*_instruction_columns(row), "history"},
        )
    return _Instructions(reading, fields)


def _check_first(
    first: Mapping[str, Any], objective: str, required: Sequence[str], wanted: str
) -> None:
    """Refuse a file whose first row lacks a field that rows of an objective must have."""
    if missing := [name for name in required if name not in first]:
        raise SettingError(
            f"objective = {show(objective)}: the first row has no {missing[0]}"
            f"{did_you_mean(missing[0], first)}: want rows of {wanted}"
        )


def _check_prompt(prompt: str, kind: str) -> None:
    """Refuse a task's prompt that rows of a format have no use for."""
    fitting = _FITTING_PROMPTS.get(kind)
    if (
        fitting is not None
        and prompt not in fitting
        and not (kind == "completion" and "{" in prompt)
    ):
        raise SettingError(
            f"prompt = {show(prompt)} does not go with rows of the format {kind!r}: "
            f"want {' or '.join(fitting)}, or rows with instruction and output"
        )


def _kind_of(row: Mapping[str, Any], json_key: str) -> tuple[str, str]:
    """Return (format, the column that decided it)."""
    if "input_ids" in row:
        return "tokens", "input_ids"
    if json_key != "text" and json_key in row:
        return "text", json_key
    for column in ("messages", "conversations", "conversation"):
        if column in row:
            return "chat", column
    instruction, output = _present(row, INSTRUCTION), _present(row, OUTPUT)
    if instruction == "prompt" and output == "completion" and _present(row, INPUT) is None:
        return "completion", "completion"
    if instruction and output:
        return "instruction", instruction
    if json_key in row:
        return "text", json_key
    problems = refused_fields(row, (), "")
    if problems:
        raise FieldError(problems[0])
    for name, value in row.items():
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            raise FieldError(
                f"{name}: holds a list of objects; if they are the rows, give the list itself as "
                f"the file, for example by jq -c '.{name}[]'"
            )
    near = did_you_mean(json_key, row)
    raise FieldError(
        f"none of the known formats has the fields {', '.join(map(repr, row)) or '(none)'}{near}: "
        f"want instruction and output; or messages; or {json_key} (the task's json_key); or "
        "input_ids and labels"
    )


def _assembled(
    pieces: Sequence[Piece], specials: SpecialTokens, learn_all: bool = False
) -> list[Row]:
    """Return pieces as one text; the end token follows unless the last piece spells one."""
    if not any(piece.text.strip() for piece in pieces if piece.is_learned or learn_all):
        return [_EMPTY]
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


def _instruction_fields(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return (instruction, input, output) of a row, under whatever names it has them."""
    instruction = _text_field(row, INSTRUCTION)
    output = _text_field(row, OUTPUT)
    name = _given_input(row)
    return instruction, _text_field(row, (name,)) if name else "", output


def _instruction_columns(row: Mapping[str, Any]) -> set[str]:
    found = (_present(row, INSTRUCTION), _given_input(row), _present(row, OUTPUT))
    return {name for name in found if name is not None}


def _given_input(row: Mapping[str, Any]) -> str | None:
    """Return the name of the field that holds the input: the first that is not empty, if any."""
    names = [name for name in INPUT if name in row]
    return next((name for name in names if row[name]), names[0] if names else None)


def _present(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _text_field(row: Mapping[str, Any], names: Sequence[str]) -> str:
    name = _present(row, names)
    if name is None:
        raise FieldError(f"{names[0]}: is missing{did_you_mean(names[0], row)}, want a text")
    value = row[name]
    if not isinstance(value, str):
        raise FieldError(f"{name} = {show(value)}: want a text")
    return encodable(value, name)
