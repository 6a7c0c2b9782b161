"""Prompt templates: how an example's fields become the text a model reads and learns to write.

A template has two halves. The *prompt* is read, the *target* is learned. Special tokens that the
template spells are tokens, those that a field spells are characters; the end-of-sequence token is
appended to the target by `tasks.rows`.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from lobra.common.errors import did_you_mean

FIELDS = ("instruction", "input", "output")
NAMES = ("auto", "alpaca", "chat", "plain")


@dataclass(frozen=True)
class Piece:
    """A part of a rendered example; what spells a special token is one only outside of fields."""

    text: str
    is_learned: bool
    is_field: bool


@dataclass(frozen=True)
class Template:
    """A single-turn template over the fields ``instruction``, ``input`` and ``output``.

    Attributes
    ----------
    prompt
        Format string of the prompt when the example has an input.
    prompt_without_input
        Format string of the prompt when the example's input is empty.
    target
        Format string of the target; holds ``{output}`` exactly once.
    """

    prompt: str
    prompt_without_input: str
    target: str = "{output}"

    def pieces(self, instruction: str, input: str, output: str) -> list[Piece]:
        """Return one example as pieces of text: the template's own words and the fields."""
        prompt = self.prompt if input else self.prompt_without_input
        values = {"instruction": instruction, "input": input, "output": output}
        found = []
        for half, is_learned in ((prompt, False), (self.target, True)):
            for literal, field, _, _ in string.Formatter().parse(half):
                found.append(Piece(literal, is_learned=is_learned, is_field=False))
                if field is not None:
                    found.append(Piece(values[field], is_learned=is_learned, is_field=True))
        return [piece for piece in found if piece.text]


# The template of Stanford Alpaca (Apache-2.0), which most instruction data is published for.
ALPACA = Template(
    prompt=(
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    ),
    prompt_without_input=(
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
    ),
)

PLAIN = Template(prompt="{instruction}\n{input}\n", prompt_without_input="{instruction}\n")

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def render_turn(role: str, content: str) -> tuple[str, str]:
    """Return (prompt, target) of one chat turn, for tokenizers without a chat template.

    A turn is ``<|role|>``, a line end and the content. What the assistant says is the target and
    the end-of-sequence token follows it; every other turn is prompt and ends with a line end.
    """
    header = f"<|{role}|>\n"
    return (header, content) if role == "assistant" else (f"{header}{content}\n", "")


def template_problem(prompt: str) -> str | None:
    """Return what is wrong with a task's ``prompt`` setting, or None if it can be used.

    Right are the names in `NAMES`, and any text with the fields ``{instruction}``, ``{input}``
    and ``{output}``, of which at least one of the first two.
    """
    if prompt in NAMES:
        return None
    if "{" not in prompt and "}" not in prompt:
        return (
            f"is no template{did_you_mean(prompt, NAMES)}: use one of {', '.join(NAMES)}, or a "
            "text with the fields {instruction}, {input}, {output}"
        )
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        return f"is not a valid template ({error}): write a literal brace as {{{{ or }}}}"
    used = []
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if spec or conversion or field not in FIELDS:
            shown = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            hint = did_you_mean(field, FIELDS)
            return (
                f"uses the field {{{shown}}}{hint}: only {{instruction}}, {{input}} and {{output}} "
                "are filled in; write a literal brace as {{ or }}"
            )
        used.append(field)
    if "instruction" not in used and "input" not in used:
        return "uses neither {instruction} nor {input}: the model would not see the example"
    if used.count("output") > 1:
        return "uses {output} more than once: the target is one piece of text"
    if "output" in used and used[-1] != "output":
        return f"uses {{{used[-1]}}} after {{output}}: all that follows {{output}} is learned"
    return None


def parse_template(prompt: str) -> Template:
    """Return the template of a ``prompt`` setting that names one or spells one out.

    A custom template is cut before ``{output}``; without that field the output follows the text.

    Raises
    ------
    ValueError
        If `template_problem` finds one, or for ``auto`` and ``chat``, which depend on the data.
    """
    if prompt == "alpaca":
        return ALPACA
    if prompt == "plain":
        return PLAIN
    problem = template_problem(prompt)
    if problem or prompt in NAMES:
        raise ValueError(f"prompt {prompt!r} {problem or 'is no single template'}")
    halves = {"prompt": "", "target": ""}
    half = "prompt"
    for literal, field, _, _ in string.Formatter().parse(prompt):
        halves[half] += literal.replace("{", "{{").replace("}", "}}")
        if field == "output":
            half = "target"
        if field is not None:
            halves[half] += f"{{{field}}}"
    head = halves["prompt"]
    return Template(head, head, target=halves["target"] or "{output}")
