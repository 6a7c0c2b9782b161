"""The rows of a JSONL data file: read, checked, and rendered into what is read and what is learned.

Formats, recognised by the fields of the first row:

=============  ====================================================================
tokens         ``input_ids`` and, unless all is learned, ``labels``
chat           ``messages``: a list of ``{"role": .., "content": ..}``
instruction    ``instruction``, ``output`` and perhaps ``input``
text           the field ``json_key`` (``text``): all of it is learned
=============  ====================================================================

A ``json_key`` other than ``text`` that the first row has makes the format ``text``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.checks import show
from tasks.errors import ConfigError, did_you_mean, first_problems
from tasks.prompts import ALPACA, ROLES, parse_template, render_turn

# Other names of the three fields in published data sets, the usual name first.
_INSTRUCTION = ("instruction", "question", "query", "problem", "prompt")
_INPUT = ("input", "context")
_OUTPUT = ("output", "response", "completion", "answer", "solution")

Message = Mapping[str, str]
#: Renders a conversation into its turns, or returns None where it cannot.
ChatRenderer = Callable[[Sequence[Message]], "TextRow | None"]


@dataclass(frozen=True)
class TextRow:
    """A row to be tokenised: pairs of (what is read, what is learned after it).

    With ``complete`` the texts spell their special tokens and ends out, as a tokenizer's own chat
    template does. Otherwise what looks like a special token is text, and the end token follows
    each learned part. Without turns there is nothing to learn.
    """

    turns: tuple[tuple[str, str], ...]
    complete: bool = False


@dataclass(frozen=True)
class TokenRow:
    """A row that is tokenised already; ``labels[k]`` is ``tokens[k]`` or -100."""

    tokens: list[int]
    labels: list[int]


Row = TextRow | TokenRow


def read_rows(
    path: Path,
    *,
    prompt: str,
    json_key: str,
    vocab_size: int,
    render_chat: ChatRenderer | None = None,
) -> list[Row]:
    """Return the rows of a JSONL file, rendered by a task's ``prompt`` setting.

    Parameters
    ----------
    path, prompt, json_key
        The file, and the settings of the task.
    vocab_size
        Token ids of tokenised rows must be below it.
    render_chat
        The tokenizer's own chat template. Where it is None or returns None, the template of
        `tasks.prompts.render_turn` is used.

    Raises
    ------
    ConfigError
        With file, line, field and remedy of every mistake (the first twenty, and a count).
    """
    problems: list[str] = []
    parse: Callable[[Mapping[str, Any]], Row] | None = None
    rows: list[Row] = []
    for number, row in _read_objects(path, problems):
        try:
            if parse is None:
                kind = _format_of(row, json_key)
                parse = _parser(kind, prompt, json_key, vocab_size, render_chat)
            rows.append(parse(row))
        except _PromptError as error:
            raise ConfigError(f"{path}: {error}") from None
        except _RowError as error:
            problems.append(f"{path}: line {number}: {error}")
    if problems:
        raise ConfigError(first_problems(problems))
    if not rows:
        raise ConfigError(f"{path}: has no rows, want one JSON object per line")
    return rows


class _RowError(ValueError):
    """What is wrong with one row."""


class _PromptError(ValueError):
    """A ``prompt`` setting that does not go with the data."""


def _read_objects(path: Path, problems: list[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield (line number, object) of every line that is one; report the other lines."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                problems.append(f"{path}: line {number}: not UTF-8 text ({error.reason})")
            except RecursionError:
                problems.append(f"{path}: line {number}: nested too deeply")
            except json.JSONDecodeError as error:
                hint = ""
                if number == 1 and text in ("[", "{"):
                    hint = "; the file looks like one JSON document, want one object per line"
                place = f"line {number}, column {error.colno}"
                problems.append(f"{path}: {place}: not valid JSON: {error.msg}{hint}")
            else:
                if isinstance(row, dict):
                    yield number, row
                else:
                    problems.append(
                        f"{path}: line {number}: is {show(row)}, want an object {{...}}"
                    )


def _format_of(row: Mapping[str, Any], json_key: str) -> str:
    if "input_ids" in row:
        return "tokens"
    if json_key != "text" and json_key in row:
        return "text"
    if "messages" in row:
        return "chat"
    if any(name in row for name in _INSTRUCTION) and any(name in row for name in _OUTPUT):
        return "instruction"
    if json_key in row:
        return "text"
    near = did_you_mean(json_key, row)
    raise _RowError(
        f"none of the known formats has the fields {', '.join(map(repr, row)) or '(none)'}{near}: "
        f"want instruction and output; or messages; or {json_key} (the task's json_key); or "
        "input_ids and labels"
    )


def _parser(
    kind: str,
    prompt: str,
    json_key: str,
    vocab_size: int,
    render_chat: ChatRenderer | None,
) -> Callable[[Mapping[str, Any]], Row]:
    """Return the function that turns a row of a format into a `Row`."""
    fitting = {"tokens": ("auto",), "chat": ("auto", "chat"), "text": ("auto", "plain")}
    if kind in fitting and prompt not in fitting[kind]:
        raise _PromptError(
            f"prompt = {show(prompt)} does not go with rows of the format {kind!r}: "
            f"want {' or '.join(fitting[kind])}, or rows with instruction and output"
        )
    if kind == "tokens":
        return lambda row: _parse_tokens(row, vocab_size)
    if kind == "text":
        return lambda row: _row_of("", _text_field(row, (json_key,)))
    if kind == "chat":
        return lambda row: _render_conversation(_messages(row), render_chat)
    if prompt == "chat":
        return lambda row: _render_conversation(_as_messages(row), render_chat)
    template = ALPACA if prompt == "auto" else parse_template(prompt)

    def parse(row: Mapping[str, Any]) -> Row:
        instruction, given, output = _instruction_fields(row)
        return _row_of(*template.render(instruction, given, output)) if output.strip() else _EMPTY

    return parse


_EMPTY = TextRow(())


def _row_of(prompt: str, target: str) -> TextRow:
    return TextRow(((prompt, target),)) if target.strip() else _EMPTY


def _instruction_fields(row: Mapping[str, Any]) -> tuple[str, str, str]:
    instruction = _text_field(row, _INSTRUCTION)
    output = _text_field(row, _OUTPUT)
    name = next((name for name in _INPUT if row.get(name) is not None), None)
    return instruction, _text_field(row, (name,)) if name else "", output


def _text_field(row: Mapping[str, Any], names: Sequence[str]) -> str:
    name = next((name for name in names if name in row), None)
    if name is None:
        raise _RowError(f"{names[0]}: is missing{did_you_mean(names[0], row)}, want a text")
    value = row[name]
    if not isinstance(value, str):
        raise _RowError(f"{name} = {show(value)}: want a text")
    return _encodable(value, name)


def _encodable(text: str, name: str) -> str:
    """Return the text unless it holds half of a surrogate pair, which no UTF-8 text can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _RowError(
            f"{name}: character {error.start} is a lone surrogate, want valid Unicode"
        ) from None
    return text


def _as_messages(row: Mapping[str, Any]) -> list[Message]:
    instruction, given, output = _instruction_fields(row)
    question = f"{instruction}\n\n{given}" if given else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


def _messages(row: Mapping[str, Any]) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise _RowError(f"messages = {show(messages)}: want a list of role and content")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise _RowError(f"{where} = {show(message)}: want an object with role and content")
        if message.get("role") not in ROLES:
            raise _RowError(
                f"{where}.role = {show(message.get('role'))}: want one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise _RowError(f"{where}.content = {show(message.get('content'))}: want a text")
        _encodable(message["content"], f"{where}.content")
    return messages


def _render_conversation(messages: Sequence[Message], render_chat: ChatRenderer | None) -> Row:
    """Return the turns up to the assistant's last word; what comes after it is not learned."""
    while messages and not (
        messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()
    ):
        messages = messages[:-1]
    if not messages:
        return _EMPTY
    rendered = render_chat(messages) if render_chat else None
    if rendered is not None:
        return rendered
    turns = []
    read = ""
    for message in messages:
        prompt, target = render_turn(message["role"], message["content"])
        read += prompt
        if message["role"] == "assistant":
            turns.append((read, target))
            read = ""
    return TextRow(tuple(turns))


def _parse_tokens(row: Mapping[str, Any], vocab_size: int) -> Row:
    tokens = row.get("input_ids")
    if tokens is None:
        raise _RowError("input_ids: is missing, want a list of token ids")
    labels = row.get("labels")
    if labels is None:
        labels = tokens
    for name, values, least in (("input_ids", tokens, 0), ("labels", labels, -100)):
        if not isinstance(values, list):
            raise _RowError(f"{name} = {show(values)}: want a list of token ids")
        for index, value in enumerate(values):
            good = isinstance(value, int) and not isinstance(value, bool)
            if not good or not least <= value < vocab_size:
                raise _RowError(
                    f"{name}[{index}] = {show(value)}: want a token id from 0 to "
                    f"{vocab_size - 1}" + (", or -100" if least else "")
                )
    if len(labels) != len(tokens):
        raise _RowError(f"labels: are {len(labels)}, want one for each of {len(tokens)} input_ids")
    for index, (token, label) in enumerate(zip(tokens, labels, strict=True)):
        if label not in (token, -100):
            raise _RowError(
                f"labels[{index}] = {label}: want {token}, the id at the same place of input_ids "
                "(the shift by one is the model's), or -100 where nothing is learned"
            )
    return TokenRow(tokens, labels)
