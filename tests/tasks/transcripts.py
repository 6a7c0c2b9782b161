"""What each template of `tests/tasks/templates` renders, written a second time, in Python.

This is the oracle of what is learned: a transcript knows where each assistant turn lies in the
text, from knowledge of the template and not by comparing renderings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """An assistant turn: characters ``start`` to ``end``, its end of turn included.

    Characters from ``end`` to ``may_end`` belong to no turn, yet it is no mistake to learn them.
    A turn ``is_empty`` if nothing is rendered of it but its end.
    """

    start: int
    end: int
    may_end: int
    is_empty: bool


@dataclass
class Transcript:
    """The text of a conversation and its assistant turns, by the index of their messages."""

    text: str = ""
    turns: dict[int, Turn] = field(default_factory=dict)

    def read(self, *texts: str) -> None:
        self.text += "".join(texts)

    def learn(self, index: int, said: str, end: str) -> None:
        start = len(self.text)
        self.text += said + end
        self.turns[index] = Turn(start, len(self.text), len(self.text), not said.strip())

    def closing(self, text: str) -> None:
        """Add what ends the conversation, be it read or learned."""
        self.text += text
        if self.turns:
            index, last = max(self.turns.items())
            self.turns[index] = replace(last, may_end=len(self.text))


#: (messages without our flags, tools, chat_template_kwargs) -> the transcript.
Transcriber = Callable[[Sequence[Message], Any, dict[str, Any]], Transcript]


def qwen25(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    first = messages[0]
    system = _content(first) if first["role"] == "system" else "You are a sparrow."
    if tools:
        system += "\n\n## Functions\nEach line below describes one.\n<tools>"
        system += "".join(f"\n{_json(tool)}" for tool in tools)
        system += "\n</tools>\nWrite <tool_call> and </tool_call> around a call."
    out.read(f"<|im_start|>system\n{system}<|im_end|>\n")
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role == "tool":
            _qwen_tool(out, messages, index)
        elif role == "assistant" and message.get("tool_calls"):
            calls = [f"<tool_call>\n{_qwen_call(call)}\n</tool_call>" for call in _calls(message)]
            out.read("<|im_start|>assistant\n")
            out.learn(index, "\n".join([*([content] if content else []), *calls]), "<|im_end|>")
            out.read("\n")
        elif role == "assistant":
            out.read("<|im_start|>assistant\n")
            out.learn(index, content, "<|im_end|>")
            out.read("\n")
        elif role == "user" or index:
            out.read(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return out


def qwen3(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    system = _content(messages[0]) if messages[0]["role"] == "system" else None
    if tools:
        before = "" if system is None else f"{system}\n\n"
        lines = "".join(f"\n{_json(tool)}" for tool in tools)
        out.read(f"<|im_start|>system\n{before}## Functions\n<tools>{lines}\n</tools><|im_end|>\n")
    elif system is not None:
        out.read(f"<|im_start|>system\n{system}<|im_end|>\n")
    question = max((k for k, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role == "tool":
            _qwen_tool(out, messages, index)
        elif role == "assistant":
            thought = message.get("reasoning_content")
            if thought is None and "</think>" in content:
                before, *_, content = content.split("</think>")
                thought = before.split("<think>")[-1]
                content = content.lstrip("\n")
            said = content
            out.read("<|im_start|>assistant\n")
            if index > question and (thought or index == len(messages) - 1):
                block = "<think>\n" + (thought or "").strip("\n") + "\n</think>\n\n"
                said = content.lstrip("\n")
                if kwargs.get("enable_thinking") is False and not thought:
                    out.read(block)  # the generation prompt holds it
                else:
                    said = block + said
            for number, call in enumerate(_calls(message)):
                said += "\n" if content or number else ""
                said += f"<tool_call>\n{_qwen_call(call)}\n</tool_call>"
            out.learn(index, said, "<|im_end|>")
            out.read("\n")
        elif role == "user" or index:
            out.read(f"<|im_start|>{role}\n{content}<|im_end|>\n")
    return out


def llama2(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    preface = ""
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role == "system":
            preface = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif role == "user":
            out.read(f"<s>[INST] {(preface + content).strip()} [/INST]")
            preface = ""
        else:
            out.learn(index, f" {content.strip()} ", "</s>")
    return out


def llama3(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript("<|begin_of_text|>")
    for index, message in enumerate(messages):
        _llama3_header(out, message["role"])
        if message["role"] == "assistant":
            out.learn(index, _content(message).strip(), "<|eot_id|>")
        else:
            out.read(_content(message).strip(), "<|eot_id|>")
    return out


def llama32(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript("<|begin_of_text|>")
    _llama3_header(out, "system")
    today = kwargs.get("date_string") or datetime.now().strftime("%d %b %Y")
    has_system = messages[0]["role"] == "system"
    preface = _content(messages[0]).strip() if has_system else ""
    environment = "Environment: sandbox\n" if tools else ""
    out.read(f"{environment}Date of today: {today}\n\n{preface}<|eot_id|>")
    for index, message in enumerate(messages):
        if has_system and index == 0:
            continue
        role, content = message["role"], _content(message)
        _llama3_header(out, "ipython" if role == "tool" else role)
        if role == "assistant":
            said = content.strip()
            for call in _calls(message):
                name, arguments = call["function"]["name"], _json(call["function"]["arguments"])
                said = f'{{"name": "{name}", "parameters": {arguments}}}'
            out.learn(index, said, "<|eot_id|>")
            continue
        if role == "tool":
            out.read(_json(content))
        else:
            if tools and index == has_system:
                out.read("Functions, as JSON:\n\n")
                out.read(*(json.dumps(t, ensure_ascii=False, indent=4) + "\n\n" for t in tools))
            out.read(content.strip())
        out.read("<|eot_id|>")
    return out


def mistral(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript("<s>")
    preface = f"{_content(messages[0])}\n\n" if messages[0]["role"] == "system" else ""
    question = max(k for k, m in enumerate(messages) if m["role"] == "user")
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role == "user" and index == question:
            if tools:
                out.read(f"[AVAILABLE_TOOLS] {_json(tools)}[/AVAILABLE_TOOLS]")
            out.read(f"[INST] {preface}{content}[/INST]")
        elif role == "user":
            out.read(f"[INST] {content}[/INST]")
        elif role == "tool":
            result = f'{{"content": {_json(content)}, "call_id": "{message["tool_call_id"]}"}}'
            out.read(f"[TOOL_RESULTS] {result}[/TOOL_RESULTS]")
        elif role == "assistant" and message.get("tool_calls"):
            calls = [
                f'{{"name": "{call["function"]["name"]}", '
                f'"arguments": {_json(call["function"]["arguments"])}, "id": "{call["id"]}"}}'
                for call in _calls(message)
            ]
            out.learn(index, f"[TOOL_CALLS] [{', '.join(calls)}]", "</s>")
        elif role == "assistant":
            out.learn(index, f" {content.strip()}", "</s>")
    return out


def gemma(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript("<bos>")
    for index, message in enumerate(messages):
        content = _content(message).strip()
        if message["role"] == "assistant":
            out.read("<start_of_turn>model\n")
            out.learn(index, content, "<end_of_turn>")
            out.read("\n")
        else:
            out.read(f"<start_of_turn>{message['role']}\n{content}<end_of_turn>\n")
    return out


def phi3(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    for index, message in enumerate(messages):
        _plain_turn(out, index, message, "<|end|>")
    out.closing("<|endoftext|>")
    return out


def zephyr(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    for index, message in enumerate(messages):
        _plain_turn(out, index, message, "</s>")
    return out


def vicuna(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript("<s>")
    if messages[0]["role"] != "system":
        out.read("A chat between a curious mind and a patient one. ")
    for index, message in enumerate(messages):
        content = _content(message)
        if message["role"] == "assistant":
            out.read("ASSISTANT:")
            out.learn(index, f" {content}", "</s>")
        else:
            out.read("USER: " if message["role"] == "user" else "", content, " ")
    return out


def deepseek_r1(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript("<｜begin▁of▁sentence｜>")
    if messages[0]["role"] == "system":
        out.read(_content(messages[0]))
    roles = [message["role"] for message in messages]
    for index, message in enumerate(messages):
        content = _content(message)
        after_tool = index > 0 and roles[index - 1] == "tool"
        if roles[index] == "user":
            out.read(f"<｜User｜>{content}")
        elif roles[index] == "tool":
            out.read("" if after_tool else "<｜tool▁outputs▁begin｜>")
            out.read(f"<｜tool▁output▁begin｜>{content}<｜tool▁output▁end｜>")
            out.read("" if roles[index + 1 : index + 2] == ["tool"] else "<｜tool▁outputs▁end｜>")
        elif roles[index] == "assistant":
            out.read("" if after_tool else "<｜Assistant｜>")
            said = content.split("</think>")[-1]
            if message.get("tool_calls"):
                calls = [
                    f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call['function']['name']}\n```json\n"
                    f"{_json(call['function']['arguments'])}\n```<｜tool▁call▁end｜>"
                    for call in _calls(message)
                ]
                said += f"<｜tool▁calls▁begin｜>{''.join(calls)}<｜tool▁calls▁end｜>"
            out.learn(index, said, "<｜end▁of▁sentence｜>")
    return out


def harmony(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    today = datetime.now().strftime("%Y-%m-%d")
    effort = kwargs.get("reasoning_effort", "medium")
    out.read(f"<|start|>system<|message|>Date: {today}\nEffort: {effort}<|end|>")
    has_system = messages[0]["role"] == "system"
    if has_system or tools:
        out.read("<|start|>developer<|message|>", _content(messages[0]) if has_system else "")
        for tool in tools or []:
            function = tool["function"]
            out.read(f"\ntype {function['name']} = {_json(function['parameters'])}")
        out.read("<|end|>")
    finals = [
        index
        for index, message in enumerate(messages)
        if message["role"] == "assistant" and not message.get("tool_calls")
    ]
    called = ""
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role == "user":
            out.read(f"<|start|>user<|message|>{content}<|end|>")
        elif role == "tool":
            out.read(f"<|start|>functions.{called} to=assistant<|channel|>commentary<|message|>")
            out.read(_json(content), "<|end|>")
        elif role == "assistant":
            out.read("<|start|>assistant")
            calls = _calls(message)
            thought = message.get("thinking") or (content if calls else "")
            analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant"
            last = index == len(messages) - 1
            kept = thought and (not finals or index > finals[-1] if calls else last)
            said = analysis if kept else ""
            if calls:
                called = calls[0]["function"]["name"]
                arguments = _json(calls[0]["function"]["arguments"])
                said += f" to=functions.{called}<|channel|>commentary json<|message|>{arguments}"
                out.learn(index, said, "<|call|>")
            else:
                said += "<|channel|>final<|message|>"
                out.learn(index, said + content, "<|return|>" if last else "<|end|>")
    return out


def generation(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()
    for index, message in enumerate(messages):
        out.read(f"<|im_start|>{message['role']}\n")
        if message["role"] == "assistant":
            out.learn(index, _content(message), "<|im_end|>")
        else:
            out.read(_content(message), "<|im_end|>")
        out.read("\n")
    return out


def granite(messages: Sequence[Message], tools: Any, kwargs: dict[str, Any]) -> Transcript:
    out = Transcript()

    def block(role: str, text: str) -> None:
        out.read(f"<|start_of_role|>{role}<|end_of_role|>{text}<|end_of_text|>\n")

    documents = kwargs.get("documents") or []
    if messages[0]["role"] != "system":
        block("system", "Be of help." + (" Use the documents." if documents else ""))
    if tools:
        block("available_tools", json.dumps(tools, ensure_ascii=False, indent=4))
    for document in documents:
        block("document " + _json({"title": document["title"]}), "\n" + document["text"])
    for index, message in enumerate(messages):
        role, content = message["role"], _content(message)
        if role != "assistant":
            block("tool_response" if role == "tool" else role, content)
            continue
        if calls := [_json({key: c["function"][key] for key in _CALL}) for c in _calls(message)]:
            content += f"<|tool_call|>[{', '.join(calls)}]"
        out.read("<|start_of_role|>assistant<|end_of_role|>")
        out.learn(index, content, "<|end_of_text|>")
        out.read("\n")
    return out


_CALL = ("name", "arguments")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _content(message: Message) -> str:
    return message.get("content") or ""


def _calls(message: Message) -> list[dict[str, Any]]:
    return message.get("tool_calls") or []


def _qwen_call(call: dict[str, Any]) -> str:
    name, arguments = call["function"]["name"], _json(call["function"]["arguments"])
    return f'{{"name": "{name}", "arguments": {arguments}}}'


def _qwen_tool(out: Transcript, messages: Sequence[Message], index: int) -> None:
    """Add a tool's answer; those in a row are one user turn."""
    roles = [message["role"] for message in messages]
    if index == 0 or roles[index - 1] != "tool":
        out.read("<|im_start|>user")
    out.read(f"\n<tool_response>\n{_content(messages[index])}\n</tool_response>")
    if roles[index + 1 : index + 2] != ["tool"]:
        out.read("<|im_end|>\n")


def _llama3_header(out: Transcript, role: str) -> None:
    out.read(f"<|start_header_id|>{role}<|end_header_id|>\n\n")


def _plain_turn(out: Transcript, index: int, message: Message, end: str) -> None:
    out.read(f"<|{message['role']}|>\n")
    if message["role"] == "assistant":
        out.learn(index, _content(message), end)
    else:
        out.read(_content(message), end)
    out.read("\n")
