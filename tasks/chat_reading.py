"""What a chat template reads of a conversation, and what it leaves out of what it writes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from functools import cache

from lobra.tasks.conversations import Conversation
from lobra.tasks.text_rows import TextRow

#: The tags by which a template itself marks what is generated (transformers' own).
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def reading_problem(conversation: Conversation, template: str) -> str | None:
    """Return what of a conversation changes training and is not read by the template, if any."""
    variables, attributes = read_by(template)
    unknown = []
    for name in ("tools", "documents"):
        if getattr(conversation, name) and name not in variables:
            unknown.append(name)
    for name in conversation.variables:
        if name in _reserved():
            return f"chat_template_kwargs.{name}: is not for the data to set"
        if name not in variables:
            unknown.append(f"chat_template_kwargs.{name}")
    for name, message in zip(conversation.names, conversation.messages, strict=True):
        if message.get("tool_calls") and "tool_calls" not in attributes:
            unknown.append(f"{name}.tool_calls")
        if message.get("reasoning_content") and not attributes & {"reasoning_content", "thinking"}:
            unknown.append(f"{name}.reasoning_content")
    if not unknown:
        return None
    return (
        f"{', '.join(unknown)}: the model's chat template does not read it; remove it from the "
        "data, or use a model whose template does"
    )


@cache
def read_by(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return (variables, attributes and keys) that a template reads; none if it is broken."""
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        tree = environment.parse(GENERATION.sub("", template))
    except jinja2.TemplateSyntaxError:
        return frozenset(), frozenset()
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    for node in tree.find_all((nodes.Getitem, nodes.Operand, nodes.Compare, nodes.Call)):
        attributes |= {
            const.value
            for const in node.find_all(nodes.Const)
            if isinstance(const.value, str) and const.value.isidentifier()
        }
    return frozenset(meta.find_undeclared_variables(tree)), frozenset(attributes)


def left_out(
    conversation: Conversation, rows: Sequence[TextRow], learn_all: bool = False
) -> list[str]:
    """Return the names of learned messages of which some words are in no row.

    White space apart: templates trim and wrap what they write.
    """
    if not rows:
        return []
    written = "".join("".join(row.text.split()) for row in rows)
    names = []
    for name, message, is_learned in zip(
        conversation.names, conversation.messages, conversation.is_learned, strict=True
    ):
        texts = (message.get("content"), message.get("reasoning_content"))
        said = ["".join(text.split()) for text in texts if isinstance(text, str)]
        if (is_learned or learn_all) and any(text not in written for text in said):
            names.append(name)
    return names


def quotes_arguments(conversation: Conversation, rows: Sequence[TextRow]) -> bool:
    """Return whether arguments of a tool call that are text are written as JSON of that text."""
    for message in conversation.messages:
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                quoted = json.dumps(arguments, ensure_ascii=False)
                if any(quoted in row.text for row in rows):
                    return True
    return False


@cache
def _reserved() -> frozenset[str]:
    """Return the arguments of ``apply_chat_template`` itself."""
    from transformers import PreTrainedTokenizerFast

    names = inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters
    return frozenset(names) | {"messages", "lobra_day"}
