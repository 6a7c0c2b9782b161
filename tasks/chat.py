"""A conversation as its model's own chat template writes it, and which parts of that are learned.

The ids of a conversation are exactly the tokenizer's own, ``apply_chat_template(messages)``; only
where a message spells a special token do its characters stay characters. What an assistant's turn
learns is what the model has to write itself: from the end of the generation prompt (which asks for
the turn) to the turn's end token.

A template may write an earlier turn differently once the conversation goes on (reasoning models
drop what was thought). Such a turn is learned in a row of its own that ends with it, as the model
will see it when it is asked for that turn; all other turns are learned in the whole conversation.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lobra.tasks.chat_reading import GENERATION, read_by, reading_problem
from lobra.tasks.conversations import REASONING, Conversation, Message
from lobra.tasks.prompts import render_turn
from lobra.tasks.special_tokens import Span, SpecialTokens
from lobra.tasks.text_rows import TextRow, replace_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SECRET = secrets.token_hex(8)  # no data can spell it
_PROBE = f"\U00100002{_SECRET}\U00100003"
_MASK = re.compile(f"\U00100004{_SECRET}\\.(\\d+)\U00100005")
_OPEN, _CLOSE = f"\U00100006{_SECRET}\U00100007", f"\U00100008{_SECRET}\U00100009"
_TAIL = 200  # characters in which a turn's end token is looked for

# A template asks the clock for the date through ``strftime_now``. This macro takes its place and
# spells the format out with the day of the run, so that a run's data do not change overnight.
_DAY_MACRO = (
    "{% macro strftime_now(format) %}{% set ns = namespace(text=format) %}"
    "{% for code, value in lobra_day.items() %}"
    "{% set ns.text = ns.text.replace(code, value) %}{% endfor %}{{ ns.text }}{% endmacro %}"
    "{{ '' }}"
)
_DAY_CODES = [f"%{flag}{code}" for code in "aAbBcdDeFgGhHIjmMnpPrRsSTuUVwWxXyYzZ" for flag in "-_0"]
_DAY_CODES += [f"%{code}" for code in "aAbBcdDeFgGhHIjmMnpPrRSTuUVwWxXyYzZ"]


class ChatError(ValueError):
    """Why a conversation cannot be written for the model."""


class ChatTemplate:
    """A tokenizer's chat template on one day; without a template, a plain one of our own.

    Parameters
    ----------
    tokenizer
        Whose template it is. It runs in transformers' sandbox.
    specials
        Its special tokens.
    day
        The date that templates with a date are told.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, specials: SpecialTokens, day: date
    ) -> None:
        self._tokenizer = tokenizer
        self._specials = specials
        self._day = day
        self._sources: dict[bool, str] = {}
        self._days: dict[str, dict[str, str]] = {}
        self._questions: dict[tuple[str, str], str] = {}

    @property
    def is_own(self) -> bool:
        """Whether the tokenizer has no chat template."""
        return not self._tokenizer.chat_template

    def rows(self, conversation: Conversation, learn_all: bool = False) -> list[TextRow]:
        """Return a conversation's rows: none if nothing is learned, mostly one.

        With ``learn_all`` it is one row, all of it learned.

        Raises
        ------
        ChatError
            If the template refuses the conversation, or does not know what it holds.
        """
        if not any(conversation.is_learned) and not (learn_all and conversation.messages):
            return []
        if self.is_own:
            return [_own_row(conversation, self._specials.end, learn_all)]
        source = self._source(conversation)
        problem = reading_problem(conversation, source)
        if problem:
            raise ChatError(problem)
        masked = self._masked(conversation)
        whole = self._render(masked, source, masked.messages)
        if learn_all:
            return [self._unmasked(whole, [(0, len(whole))])]
        shared: list[Span] = []
        alone: list[TextRow] = []
        for index, is_learned in enumerate(masked.is_learned):
            if not is_learned:
                continue
            is_last = index + 1 == len(masked.messages)
            text = whole if is_last else self._render(masked, source, masked.messages[: index + 1])
            spans = self._turn(masked, source, index, text)
            if whole.startswith(text[: spans[-1][1]]):
                shared += spans
            else:
                alone.append(self._unmasked(text, spans))
        return ([self._unmasked(whole, shared)] if shared else []) + alone

    def ignored_fields(self, conversation: Conversation) -> list[str]:
        """Return the fields of messages that the template does not read."""
        known = frozenset() if self.is_own else read_by(self._source(conversation))[1]
        names: set[str] = set().union(*conversation.messages)
        names -= {"role", "content", "tool_calls", *REASONING}
        return sorted(f"messages[].{name}" for name in names - known)

    def _source(self, conversation: Conversation) -> str:
        """Return the template's text, that of tools if there are any, its clock replaced."""
        with_tools = conversation.tools is not None
        if with_tools not in self._sources:
            tools: Any = [{}] if with_tools else None
            try:
                source = self._tokenizer.get_chat_template(None, tools)
            except ValueError as error:  # several templates, none of them the default
                raise ChatError(" ".join(str(error).split())) from None
            if "strftime_now" in source:
                source = _DAY_MACRO + source
            self._sources[with_tools] = source
        return self._sources[with_tools]

    def _attempt(
        self,
        conversation: Conversation,
        source: str,
        messages: Sequence[Message],
        prompted: bool = False,
    ) -> str | None:
        """Return the rendered messages, or None where the template refuses them."""
        if not messages:
            return None
        try:
            return self._render(conversation, source, messages, prompted)
        except ChatError:
            return None

    def _render(
        self,
        conversation: Conversation,
        source: str,
        messages: Sequence[Message],
        prompted: bool = False,
    ) -> str:
        variables = dict(conversation.variables)
        if source.startswith(_DAY_MACRO):
            variables["lobra_day"] = self._day_parts(source)
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                tools=conversation.tools and list(conversation.tools),
                documents=conversation.documents and list(conversation.documents),
                chat_template=source,
                tokenize=False,
                add_generation_prompt=prompted,
                **variables,
            )
        except Exception as error:  # templates raise what they like
            reason = " ".join(str(error).split())
            raise ChatError(
                f"the model's chat template does not take this conversation: {reason}; change it, "
                "or leave the row out"
            ) from None
        assert isinstance(text, str)
        return text

    def _day_parts(self, source: str) -> dict[str, str]:
        """Return what the codes of strftime that a template spells stand for."""
        if source not in self._days:
            codes = [code for code in _DAY_CODES if code in source.removeprefix(_DAY_MACRO)]
            parts = {code: self._day.strftime(code) for code in codes}
            self._days[source] = {"%%": "\0", **parts, "\0": "%"}
        return self._days[source]

    def _turn(self, conversation: Conversation, source: str, index: int, text: str) -> list[Span]:
        """Return what is learned of a text whose last message is an assistant's."""
        before = conversation.messages[:index]
        if GENERATION.search(source):
            plain = self._attempt(conversation, source, before)
            return self._marked_turn(conversation, source, index, len(plain or ""))
        question = self._generation_prompt(conversation, source)
        asked = self._attempt(conversation, source, before, prompted=True) if question else None
        start = len(asked) if asked is not None and text.startswith(asked) else None
        if start is not None:
            end = self._plain_end(conversation.messages[index], text)
            if end is not None:
                return [(start, end)]
        other = self._attempt(
            conversation, source, [*before, {"role": "assistant", "content": _PROBE}]
        )
        if other is None or _PROBE not in other:
            if start is None or other is not None:
                raise ChatError(
                    f"{conversation.names[index]}: what the assistant says cannot be told apart "
                    "from the rest of what the model's chat template writes"
                )
            return [(start, self._end_of_turn(text, start))]
        # Where the message's own text begins and ends: where another message's would differ.
        begin = _common(text, other)
        end = max(len(text) - _common(text[::-1], other[::-1]), begin)
        if start is None:
            start = begin
            plain = self._attempt(conversation, source, before)
            if question and question in text[:begin]:
                start = text.rindex(question, 0, begin) + len(question)
            elif plain is not None and text[:begin].rstrip() == plain.rstrip():
                start = min(len(plain), begin)
        return [(start, self._end_of_turn(text, max(start, end)))]

    def _plain_end(self, message: Message, text: str) -> int | None:
        """Return where a turn ends if the text ends with its words and one special token.

        That is most often so, and spares another rendering.
        """
        said = message.get("content", "").rstrip()
        body = text.rstrip()
        last = self._specials.find(body[-_TAIL:])
        if not said or message.get("tool_calls") or not last or last[-1][1] != len(body[-_TAIL:]):
            return None
        words = body[: len(body) - (last[-1][1] - last[-1][0])].rstrip()
        return len(body) if words.endswith(said) else None

    def _generation_prompt(self, conversation: Conversation, source: str) -> str:
        """Return what the template writes to ask for a turn, as far as a question shows it."""
        key = source, json.dumps(conversation.variables, sort_keys=True, default=str)
        if key not in self._questions:
            question = [{"role": "user", "content": _PROBE}]
            plain = self._attempt(conversation, source, question)
            asked = self._attempt(conversation, source, question, prompted=True)
            found = plain is not None and asked is not None and asked.startswith(plain)
            self._questions[key] = asked[len(plain) :] if found else ""  # type: ignore[index, arg-type]
        return self._questions[key]

    def _end_of_turn(self, text: str, place: int) -> int:
        """Return where a turn ends whose own text ends at ``place`` at the earliest.

        That is after its end token and further special tokens that follow without a gap. Without
        any, the turn ends with the text, whose white space is no part of it unless nothing else
        ends the turn.
        """
        stop = None
        for start, end in self._specials.find(text):
            if end <= place:
                continue
            if stop is not None and start != stop:
                break
            stop = end
        if stop is not None:
            return stop
        return len(text.rstrip()) if text[place:].strip() else len(text)

    def _marked_turn(
        self, conversation: Conversation, source: str, index: int, done: int
    ) -> list[Span]:
        """Return what the template itself marks as generated of a conversation's last message."""
        marked = GENERATION.sub(
            lambda match: (
                f"{{%{match[1]} if true %}}{_CLOSE if match[2] else _OPEN}{{% endif {match[3]}%}}"
            ),
            source,
        )
        text = self._render(conversation, marked, conversation.messages[: index + 1])
        spans: list[Span] = []
        place = 0
        for piece in re.split(f"({_OPEN}|{_CLOSE})", text):
            if piece == _OPEN:
                spans.append((place, place))
            elif piece == _CLOSE:
                spans[-1] = (spans[-1][0], place)
            else:
                place += len(piece)
        found = [span for span in spans if span[0] >= done and span[0] < span[1]] or spans[-1:]
        if not found:
            raise ChatError(
                f"{conversation.names[index]}: the model's chat template marks no part of it as "
                "generated"
            )
        return found

    def _masked(self, conversation: Conversation) -> Conversation:
        """Return the conversation with the special tokens that it spells made unrecognisable."""

        def masked(value: Any) -> Any:
            if isinstance(value, str):
                spans = self._specials.find(value)
                edits = [(span, self._masks[value[slice(*span)]]) for span in spans]
                return replace_spans(value, edits, ())[0] if edits else value
            if isinstance(value, Mapping):
                return {masked(key): masked(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [masked(item) for item in value]
            return value

        return replace(
            conversation,
            messages=tuple(masked(conversation.messages)),
            tools=conversation.tools and tuple(masked(conversation.tools)),
            documents=conversation.documents and tuple(masked(conversation.documents)),
            variables=masked(conversation.variables),
        )

    @cached_property
    def _masks(self) -> dict[str, str]:
        return {
            spelling: f"\U00100004{_SECRET}.{number}\U00100005"
            for number, spelling in enumerate(self._specials.spellings)
        }

    def _unmasked(self, text: str, learned: Sequence[Span]) -> TextRow:
        edits = [
            (match.span(), self._specials.spellings[int(match[1])])
            for match in _MASK.finditer(text)
        ]
        if any(text.count(mark) != len(edits) for mark in "\U00100004\U00100005"):
            raise ChatError(
                "a text spells a special token, and the model's chat template cuts or changes it; "
                "remove the special token from the data"
            )
        if not edits:
            return TextRow(text, tuple(learned), begins=False)
        spans = [span for span, _ in edits]
        plain, moved = replace_spans(text, edits, [*learned, *spans])
        count = len(learned)
        return TextRow(plain, tuple(moved[:count]), tuple(moved[count:]), begins=False)


def _own_row(conversation: Conversation, end: str, learn_all: bool) -> TextRow:
    """Return a conversation in the form for tokenizers without a chat template."""
    problem = _beyond_text(conversation)
    if problem:
        raise ChatError(f"{problem}: the tokenizer has no chat template that could write it")
    text = ""
    learned: list[Span] = []
    verbatim: list[Span] = []
    for message, is_learned in zip(conversation.messages, conversation.is_learned, strict=True):
        content = message.get("content", "")
        prompt, target = render_turn(message["role"], content)
        start = len(text)
        text += prompt + target
        verbatim.append((start, len(text)))
        if message["role"] == "assistant":
            text += end
            if is_learned:
                learned.append((start + len(prompt), len(text)))
    return TextRow(text, ((0, len(text)),) if learn_all else tuple(learned), tuple(verbatim))


def _beyond_text(conversation: Conversation) -> str | None:
    """Return which part of a conversation is more than who says what, if any."""
    if conversation.tools:
        return "tools"
    if conversation.documents:
        return "documents"
    if conversation.variables:
        return f"chat_template_kwargs {', '.join(conversation.variables)}"
    for where, message in zip(conversation.names, conversation.messages, strict=True):
        for name in ("tool_calls", "reasoning_content"):
            if message.get(name):
                return f"{where}.{name}"
    return None


def _common(one: str, other: str) -> int:
    """Return how many first characters two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # halving with slices is faster than a loop over the characters
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
