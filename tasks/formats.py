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

from collections.abc import Mapping
from typing import Any

from lobra.common.errors import did_you_mean, show
from lobra.tasks.answer_format import Answers
from lobra.tasks.chat_format import Chats
from lobra.tasks.conversations import (
    FieldError,
    conversation_of_completion,
    conversation_of_instruction,
    conversation_of_messages,
)
from lobra.tasks.fields import INPUT, INSTRUCTION, OUTPUT, refused_fields
from lobra.tasks.objectives import PPO, SUPERVISED
from lobra.tasks.row_format import Reading, RowFormat, SettingError
from lobra.tasks.text_formats import (
    Instructions,
    Texts,
    instruction_columns,
    instruction_fields,
    present,
)
from lobra.tasks.token_formats import Rollouts, Tokens

_FITTING_PROMPTS = {
    "tokens": ("auto",),
    "rollout": ("auto",),
    "chat": ("auto", "chat"),
    "text": ("auto", "plain"),
    "completion": ("auto", "plain", "chat", "alpaca"),
}


def format_of(fields: Mapping[str, Any], reading: Reading) -> RowFormat:
    """Return the parser of a file whose first row has these fields."""
    if reading.objective == PPO:
        _check_prompt(reading.prompt, Rollouts.kind)
        return Rollouts(reading, fields)
    if reading.objective != SUPERVISED:
        return Answers(reading, fields, format_of)
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
        return Tokens(reading)
    if kind == "text":
        return Texts(reading, (), column)
    if kind == "chat" and column == "completion":
        return Chats(reading, conversation_of_completion, lambda _: ("prompt", "completion"))
    if kind == "chat":
        return Chats(
            reading, lambda row: conversation_of_messages(row, column), lambda _: (column,)
        )
    if kind == "completion" and prompt in ("auto", "plain"):
        return Texts(reading, ("prompt",), "completion")
    if prompt == "chat":
        return Chats(
            reading,
            lambda row: conversation_of_instruction(row, *instruction_fields(row)),
            lambda row: {*instruction_columns(row), "history"},
        )
    return Instructions(reading, fields)


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
    instruction, output = present(row, INSTRUCTION), present(row, OUTPUT)
    if instruction == "prompt" and output == "completion" and present(row, INPUT) is None:
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
