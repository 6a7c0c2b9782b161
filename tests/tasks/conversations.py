"""Random conversations that a family's template accepts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from tests.tasks.families import MARK, Family
from tests.tasks.transcripts import Message

#: Our own flags of a message: it is not learned, or it is, as without them.
UNLEARNED: tuple[dict[str, Any], ...] = ({"weight": 0}, {"train": False}, {"trainable": False})
LEARNED: tuple[dict[str, Any], ...] = ({"weight": 1}, {"train": True}, {"trainable": True})
_FLAGS = ("weight", "train", "trainable")

# What templates are made of, as text; each is filtered where a family has it as a special token.
_LITERALS = (
    "im_end",
    "[INST]",
    "[/INST] x",
    "<<SYS>>",
    "</think>",
    "a</think>b",
    "<think>\nhm\n</think>\n\nyes",
    "<|user|>\nhi",
    "assistant\n",
    "ASSISTANT: no",
    "USER:",
    "<|im_",
    "|>",
    "<tool_call>",
    "</tool_response>",
    "{{ messages }}",
    "{% endfor %}",
    "model\n",
    "<0x41>",
    "<｜User｜>",
    "'\"\\",
)
_WORDS = (
    "hello",
    "The cat sat on the mat.",
    "two\nlines",
    "\n\nparagraphs\n\n\nand more",
    "  spaces at both ends  ",
    "\ttab\n",
    " ",
    "\n",
    "",
    "",
    "e\u0301t\u00e9",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\U0001f600 a \U0001f468\u200d\U0001f469",
    "\u00a0hard\u3000space\u00a0",
    "def add(a, b):\n    return a + b\n",
    "4",
)


@dataclass(frozen=True)
class Conversation:
    """A row of a chat data set: messages with our flags, tools, arguments of the template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {"messages": self.messages}
        if self.tools is not None:
            row["tools"] = self.tools
        if self.kwargs:
            row["chat_template_kwargs"] = self.kwargs
        return row

    def plain(self) -> list[Message]:
        """Return the messages without our flags, as a template is to see them."""
        return [
            {name: value for name, value in message.items() if name not in _FLAGS}
            for message in self.messages
        ]

    def is_learned(self, index: int) -> bool:
        message = self.messages[index]
        return message["role"] == "assistant" and all(message.get(name, True) for name in _FLAGS)

    def with_texts(self, change: Callable[[str], str]) -> Conversation:
        """Return the conversation with every content changed."""
        messages = copy.deepcopy(self.messages)
        for message in messages:
            for name in ("content", "reasoning_content", "thinking"):
                if isinstance(message.get(name), str):
                    message[name] = change(message[name])
        return Conversation(messages, self.tools, self.kwargs)

    def spells(self, family: Family) -> bool:
        """Return whether a message spells a special token of the family."""
        found = [
            token
            for message in self.messages
            for text in message.values()
            if isinstance(text, str)
            for token in family.special
            if token in text
        ]
        return bool(found)

    def harmless(self, family: Family) -> Conversation:
        """Return the conversation with other text wherever it spells a special token."""

        def change(text: str) -> str:
            for token in family.special:
                text = text.replace(token, "@@")
            return text

        return self.with_texts(change)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tell the weather, in \u00b0C",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {
        "type": "function",
        "function": {"name": "add", "description": "a + b", "parameters": {"type": "object"}},
    },
]


def call(name: str, arguments: dict[str, Any], number: int = 0) -> dict[str, Any]:
    """Return a call of a tool, as an assistant's message lists it."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def contents(family: Family, spelling: bool) -> st.SearchStrategy[str]:
    """Return texts of messages; with ``spelling`` some spell a special token of the family."""
    letters = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"))
    letters = letters.filter(lambda letter: letter != MARK)
    literals = [text for text in _LITERALS if not any(s in text for s in family.special)]
    piece = st.sampled_from(_WORDS) | st.sampled_from(literals) | st.text(letters, max_size=6)
    texts = piece | st.lists(piece, max_size=3).map("".join)
    if spelling:
        spelled = st.tuples(piece, st.sampled_from(family.special), piece).map("".join)
        texts = st.integers(0, 3).flatmap(lambda k: texts if k else spelled)
    return texts


@st.composite
def conversations(draw: Any, family: Family) -> Conversation:
    """Draw a conversation of one to six questions that the family's template accepts.

    Its last message is an assistant's that says something; at least one assistant turn that says
    something is learned. One in eight may spell special tokens.
    """
    texts = contents(family, spelling=draw(st.integers(0, 7)) == 0)
    speech = texts.filter(lambda text: bool(_said(family, text)))
    kwargs = copy.deepcopy(draw(st.sampled_from(({}, *family.kwargs))))
    quiet = kwargs.get("enable_thinking") is False
    tools = copy.deepcopy(draw(st.sampled_from((None, TOOLS, TOOLS[:1])))) if family.calls else None
    messages: list[Message] = []
    if family.has_system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    if not family.alternates and draw(st.integers(0, 9)) == 0:
        messages.append({"role": "assistant", "content": draw(texts)})
    turns = draw(st.integers(1, 6))
    for number in range(turns):
        last = number == turns - 1
        for _ in range(1 if family.alternates else draw(st.sampled_from((1, 1, 1, 2)))):
            messages.append({"role": "user", "content": draw(texts)})
        calling = bool(tools) and draw(st.booleans())
        while calling:
            called = _calls(draw, family, texts, len(messages))
            messages.append(called)
            # The conversation may end with a call.
            if last and draw(st.integers(0, 3)) == 0:
                break
            for asked in called["tool_calls"]:
                name = asked["function"]["name"]
                result = {"role": "tool", "name": name, "tool_call_id": asked["id"]}
                messages.append({**result, "content": draw(texts)})
            calling = draw(st.integers(0, 2)) == 0
        else:
            content = draw(speech if last else texts)
            messages.append({"role": "assistant", "content": content})
    if quiet:
        messages = [_without_thoughts(message) for message in messages]
    for message in messages:
        if message["role"] != "assistant":
            continue
        says = message.get("tool_calls") or _said(family, message["content"])
        holds = message.get("content") if message.get("tool_calls") else False
        if family.reasoning and not quiet and says and not holds and draw(st.booleans()):
            message[family.reasoning] = draw(speech)
        if draw(st.integers(0, 4)) == 0:
            message.update(draw(st.sampled_from((*UNLEARNED, *LEARNED))))
    conversation = Conversation(messages, tools if family.announces_tools else None, kwargs)
    speaking = [
        index
        for index, message in enumerate(messages)
        if conversation.is_learned(index)
        and (message.get("tool_calls") or _said(family, message["content"]))
    ]
    if not speaking:
        for name in _FLAGS:
            messages[-1].pop(name, None)
    return conversation


def _calls(draw: Any, family: Family, texts: st.SearchStrategy[str], number: int) -> Message:
    """Draw an assistant's message with calls; its content may be empty, null or absent."""
    names = draw(st.lists(st.sampled_from(("weather", "add")), min_size=1, max_size=family.calls))
    values = st.sampled_from(("Paris", "\u5317\u4eac", 'a "b"\n', "")) | st.integers(0, 9)
    arguments = st.dictionaries(st.sampled_from(("city", "a", "b")), values, max_size=2)
    message: Message = {"role": "assistant"}
    content = draw(st.sampled_from(("absent", None, "", "text")))
    if content != "absent":
        message["content"] = draw(texts) if content == "text" else content
    message["tool_calls"] = [
        call(name, draw(arguments), 10 * number + place) for place, name in enumerate(names)
    ]
    return message


def _said(family: Family, content: str) -> str:
    """Return what is left of an answer where thoughts are dropped."""
    if family.name in ("qwen3", "deepseek_r1"):
        content = content.split("</think>")[-1]
    return content.strip()


def _without_thoughts(message: Message) -> Message:
    if message["role"] == "assistant" and "think>" in (message.get("content") or ""):
        return {**message, "content": "no thoughts"}
    return message
