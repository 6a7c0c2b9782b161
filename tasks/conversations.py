"""Conversations: what rows in the chat formats say, in one form.

Read are OpenAI's and TRL's ``messages`` (``role``, ``content``, ``tool_calls``, ...), ShareGPT's
``conversations`` (``from``, ``value``), TRL's conversational ``prompt`` / ``completion``, and
instruction rows with LLaMA-Factory's ``system`` and ``history``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lobra.common.errors import did_you_mean, show
from lobra.tasks.prompts import ROLES

Message = Mapping[str, Any]

#: ShareGPT's names of roles.
ROLE_ALIASES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # ShareGPT roles whose value is the JSON of tool calls

#: A message's fields that say whether it is learned.
FLAGS = ("weight", "train", "trainable")
#: Names of the text that precedes an answer; templates read the first or ``thinking``.
REASONING = ("reasoning_content", "reasoning", "thinking")
#: A message's fields that change training whatever they say, with what to do instead.
REFUSED_MARKS: Mapping[str, str] = {
    "train_detail": "parts of a message cannot be chosen; set train for the whole message",
    "training_detail": "parts of a message cannot be chosen; set train for the whole message",
    "mask": "say weight: 0 for a message that is not learned",
    "loss": "say weight: 0 for a message that is not learned",
    "loss_weight": "say weight: 0 or 1",
}
#: A message's fields that change training if they hold something, with what to do instead.
REFUSED_MESSAGE_FIELDS: Mapping[str, str] = {
    "function_call": "write it as tool_calls: [{'type': 'function', 'function': {..}}]",
    "refusal": "write the refusal as the message's content",
    "images": "only texts are trained; remove it",
    "image": "only texts are trained; remove it",
    "audio": "only texts are trained; remove it",
    "videos": "only texts are trained; remove it",
    "prefix": "not supported; remove it",
}


class FieldError(ValueError):
    """What is wrong with a field of a row."""


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them.

    Attributes
    ----------
    messages
        With ``role`` and whatever else their author gave them; no field is null.
    is_learned
        Of each message: an assistant's, with something to say, and not marked otherwise.
    names
        What each message is called in its row, such as ``messages[2]``.
    is_marked
        Whether the author marked which messages are learned.
    tools, documents
        The tools and documents the template is to announce.
    variables
        Further variables of the template (``chat_template_kwargs``).
    """

    messages: tuple[Message, ...]
    is_learned: tuple[bool, ...]
    names: tuple[str, ...]
    is_marked: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None
    documents: tuple[Mapping[str, Any], ...] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


#: A row's fields beside its messages that a conversation obeys.
_SYSTEM = ("system", "system_prompt", "system_message")
SETTINGS = (*_SYSTEM, "tools", "documents", "chat_template_kwargs")


def conversation_of_messages(row: Mapping[str, Any], column: str) -> Conversation:
    """Return the conversation of a row with ``messages`` or ``conversations``.

    Raises
    ------
    FieldError
        Naming the first field that is wrong, or that would change training and is not known.
    """
    return _finished(row, *_messages(row.get(column), column))


def conversation_of_completion(row: Mapping[str, Any]) -> Conversation:
    """Return the conversation of a row whose ``prompt`` and ``completion`` are messages.

    Only the completion's messages are learned.
    """
    prompt, prompt_names = _messages(row["prompt"], "prompt")
    completion, names = _messages(row["completion"], "completion")
    return _finished(
        row, [*prompt, *completion], [*prompt_names, *names], first_learned=len(prompt)
    )


def conversation_of_instruction(
    row: Mapping[str, Any], instruction: str, given: str, output: str
) -> Conversation:
    """Return the conversation of an instruction row, its ``history`` first."""
    messages: list[dict[str, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise FieldError(f"history = {show(history)}: want a list of [question, answer]")
    for index, pair in enumerate(history):
        good = isinstance(pair, list) and len(pair) == 2
        if not good or not all(isinstance(text, str) for text in pair):
            raise FieldError(f"history[{index}] = {show(pair)}: want [question, answer]")
        messages.append({"role": "user", "content": encodable(pair[0], f"history[{index}]")})
        messages.append({"role": "assistant", "content": encodable(pair[1], f"history[{index}]")})
    question = f"{instruction}\n\n{given}" if given and instruction else instruction or given
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    names = [f"history[{index // 2}]" for index in range(2 * len(history))]
    return _finished(row, messages, [*names, "instruction", "output"])


def _finished(
    row: Mapping[str, Any],
    messages: Sequence[dict[str, Any]],
    names: Sequence[str],
    first_learned: int = 0,
) -> Conversation:
    is_learned, is_marked = [], False
    for index, message in enumerate(messages):
        flag = _flag(message, names[index])
        is_marked |= flag is not None
        speaks = message["role"] == "assistant" and _says_something(message)
        is_learned.append(speaks and flag is not False and index >= first_learned)
    plain = [{k: v for k, v in message.items() if k not in FLAGS} for message in messages]
    names = list(names)
    column = next((name for name in _SYSTEM if row.get(name)), None)
    if column is not None:
        system = row[column]
        if not isinstance(system, str):
            raise FieldError(f"{column} = {show(system)}: want a text")
        first = plain[0] if plain else {}
        if first.get("role") != "system":
            plain.insert(0, {"role": "system", "content": encodable(system, column)})
            is_learned.insert(0, False)
            names.insert(0, column)
        elif first.get("content") != system:
            raise FieldError(f"{column}: the messages begin with another system message, keep one")
    variables = row.get("chat_template_kwargs") or {}
    if isinstance(variables, str):
        variables = _from_json(variables, "chat_template_kwargs")
    if not isinstance(variables, dict):
        raise FieldError(f"chat_template_kwargs = {show(variables)}: want an object")
    named = {name: row.get(name) or variables.get(name) for name in ("tools", "documents")}
    return Conversation(
        tuple(plain),
        tuple(is_learned),
        tuple(names),
        is_marked,
        _objects(named["tools"], "tools"),
        _objects(named["documents"], "documents"),
        {name: value for name, value in variables.items() if name not in named},
    )


def _messages(value: Any, column: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a column's messages, and what each is called."""
    if not isinstance(value, list):
        raise FieldError(f"{column} = {show(value)}: want a list of role and content")
    names = [f"{column}[{index}]" for index in range(len(value))]
    return [_message(entry, name) for entry, name in zip(value, names, strict=True)], names


def _message(entry: Any, where: str) -> dict[str, Any]:
    """Return a message with ``role``, without nulls, its content one text; or refuse it."""
    if not isinstance(entry, dict):
        raise FieldError(f"{where} = {show(entry)}: want an object with role and content")
    message = {str(key): value for key, value in entry.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
        if "content" not in message and "value" in message:
            message["content"] = message.pop("value")
    role = message.get("role")
    if isinstance(role, str):
        if role.lower() in _CALLS:
            message.update(_called(message.get("content"), where))
        else:
            message["role"] = ROLE_ALIASES.get(role.lower(), role)
    if message.get("role") not in ROLES:
        hint = did_you_mean(role, (*ROLES, *ROLE_ALIASES)) if isinstance(role, str) else ""
        raise FieldError(f"{where}.role = {show(role)}: want one of {', '.join(ROLES)}{hint}")
    for name, remedy in (*REFUSED_MARKS.items(), *REFUSED_MESSAGE_FIELDS.items()):
        if name in message and (name in REFUSED_MARKS or message[name] not in ("", [], {}, False)):
            raise FieldError(f"{where}.{name} = {show(message[name])}: {remedy}")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}.tool_calls")
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise FieldError(f"{where}: its reasoning is {show(reasoning)}: want a text")
        # As transformers does from 5.2x on: templates know the field by one name or another.
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{where}.content")
    if "content" not in message and message["role"] == "assistant" and _says_something(message):
        _check_texts(message, where)
        return message
    if not isinstance(message.get("content"), str):
        raise FieldError(f"{where}.content = {show(message.get('content'))}: want a text")
    _check_texts(message, where)
    return message


def _called(value: Any, where: str) -> dict[str, Any]:
    """Return an assistant's message of ShareGPT's ``function_call``, whose value is JSON."""
    calls = _from_json(value, f"{where}.value") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    functions = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise FieldError(f"{where}.value = {show(value)}: want JSON with name and arguments")
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"{where}.value: arguments")
        functions.append({"type": "function", "function": {**call, "arguments": arguments}})
    return {"role": "assistant", "content": "", "tool_calls": functions}


def _joined(parts: Sequence[Any], where: str) -> str:
    """Return the text of a content that is a list of OpenAI's text parts."""
    texts = []
    for index, part in enumerate(parts):
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise FieldError(
                f"{where}[{index}] = {show(part)}: only parts of type text are trained"
            )
        texts.append(part)
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls as OpenAI writes them; also taken are bare ``{name, arguments}``."""
    if not isinstance(calls, list):
        raise FieldError(f"{where} = {show(calls)}: want a list of calls")
    found = []
    for index, call in enumerate(calls):
        if isinstance(call, dict) and "function" not in call and "name" in call:
            call = {"type": "function", "function": call}
        function = call.get("function") if isinstance(call, dict) else None
        good = isinstance(function, dict) and isinstance(function.get("name"), str)
        if function is None or not good or "arguments" not in function:
            raise FieldError(
                f"{where}[{index}] = {show(call)}: want "
                "{'type': 'function', 'function': {'name': .., 'arguments': {..}}}"
            )
        found.append(call)
    return found


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    texts = (content, message.get("reasoning_content"))
    return bool(message.get("tool_calls")) or any(
        isinstance(text, str) and text.strip() for text in texts
    )


def _flag(message: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a message is marked as learned (True) or not (False); None: not marked."""
    found: set[bool] = set()
    for name in FLAGS:
        value = message.get(name)
        if value is None:
            continue
        if value not in (0, 1) or isinstance(value, str):
            wanted = "0 or 1" if name == "weight" else "true or false"
            raise FieldError(f"{where}.{name} = {show(value)}: want {wanted}")
        found.add(bool(value))
    if len(found) > 1:
        raise FieldError(f"{where}: {', '.join(FLAGS)} contradict each other, keep one of them")
    if True in found and message["role"] != "assistant":
        raise FieldError(
            f"{where}: a message of the role {message['role']} is marked as learned: only the "
            "assistant's can be (train_on_inputs: true learns everything)"
        )
    return next(iter(found), None)


def _objects(value: Any, name: str) -> tuple[Mapping[str, Any], ...] | None:
    if isinstance(value, str) and value.strip():
        value = _from_json(value, name)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise FieldError(f"{name} = {show(value)}: want a list of objects, or the JSON of one")
    _check_texts(value, name)
    return tuple(value)


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{where} = {show(text)}: not valid JSON ({error})") from None


def _check_texts(value: Any, where: str) -> None:
    """Refuse a text in a value, at any depth, that is no valid Unicode."""
    if isinstance(value, str):
        encodable(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            encodable(str(key), where)
            _check_texts(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_texts(item, f"{where}[{index}]")


def encodable(text: str, name: str) -> str:
    """Return the text unless it holds half of a surrogate pair, which no UTF-8 text can.

    Raises
    ------
    FieldError
        If it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(
            f"{name}: character {error.start} is a lone surrogate, want valid Unicode"
        ) from None
    return text
