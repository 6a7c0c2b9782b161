from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.tasks.prompts import ALPACA, NAMES, PLAIN, parse_template, render_turn, template_problem
from tests.tasks.support import rendered

texts = st.text(max_size=30)


@given(instruction=texts, given_=texts, output=texts)
def test_prompt_and_target_hold_the_fields_as_they_are(
    instruction: str, given_: str, output: str
) -> None:
    for template in (ALPACA, PLAIN, parse_template("{{Q}} {instruction}|{input}|")):
        prompt, target = rendered(template, instruction, given_, output)
        assert target == output
        assert instruction in prompt and given_ in prompt


def test_alpaca_asks_differently_with_and_without_input() -> None:
    assert "### Input:\nx" in rendered(ALPACA, "do", "x", "y")[0]
    assert "Input" not in rendered(ALPACA, "do", "", "y")[0]
    assert rendered(ALPACA, "do", "", "y")[0].endswith("### Response:\n")


@given(st.text(alphabet="ab{}", max_size=6), st.text(alphabet="ab{}", max_size=6), texts)
def test_a_custom_template_is_cut_before_the_output(head: str, tail: str, output: str) -> None:
    def escaped(text: str) -> str:
        return text.replace("{", "{{").replace("}", "}}")

    template = parse_template(escaped(head) + "{instruction}{output}" + escaped(tail))
    assert rendered(template, "I", "", output) == (f"{head}I", f"{output}{tail}")


def test_a_literal_output_in_braces_is_no_field() -> None:
    template = parse_template("{{output}} {input}{output}!")
    assert rendered(template, "i", "x", "y") == ("{output} x", "y!")


def test_without_output_the_output_follows() -> None:
    assert rendered(parse_template("{instruction}: "), "a", "", "b") == ("a: ", "b")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_right(name: str) -> None:
    assert template_problem(name) is None


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("alpacca", "did you mean 'alpaca'"),
        ("", "no template"),
        ("{instruction", "not a valid template"),
        ("{instruction}}", "not a valid template"),
        ("{instruct}", "did you mean 'instruction'"),
        ("{0}", "{0}"),
        ("{}", "only {instruction}"),
        ("{instruction!r}", "{instruction!r}"),
        ("{instruction:>9}", "{instruction:>9}"),
        ("{instruction.__class__}", "only {instruction}"),
        ("{output}", "neither"),
        ("{instruction}{output}{output}", "more than once"),
        ("{output}{instruction}", "after {output}"),
    ],
)
def test_unusable_templates_are_explained(prompt: str, hint: str) -> None:
    problem = template_problem(prompt)
    assert problem is not None and hint in problem
    with pytest.raises(ValueError):
        parse_template(prompt)


@pytest.mark.parametrize("name", ["auto", "chat"])
def test_auto_and_chat_are_no_single_template(name: str) -> None:
    with pytest.raises(ValueError):
        parse_template(name)


def test_only_what_the_assistant_says_is_learned() -> None:
    assert render_turn("user", "hi") == ("<|user|>\nhi\n", "")
    assert render_turn("assistant", "hello") == ("<|assistant|>\n", "hello")
