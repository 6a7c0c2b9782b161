from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lobra.common.errors import Problems
from lobra.common.models import (
    Count,
    FileModel,
    Flag,
    Mistake,
    OneOf,
    Positive,
    PositiveInt,
    Share,
    Text,
    json_schema,
    read_as,
)


@dataclass(frozen=True)
class Wheel(FileModel):
    """A wheel."""

    size: PositiveInt
    """In inches."""
    kind: Annotated[str, OneOf(("disc", "spoke"))] = "spoke"
    weight: Positive = 1.0
    worn: Share = 0.0
    spokes: Count | None = None
    spare: Flag = False

    @classmethod
    def stranger(cls, name: str) -> tuple[str | None, str]:
        return ("size", ": it is called size") if name == "inches" else super().stranger(name)

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Mapping[str, Mistake]:
        if given.get("kind") == "disc" and "spokes" in given:
            return {"spokes": Mistake("a disc has none", given["spokes"])}
        return {}


@dataclass(frozen=True)
class Cart(FileModel):
    """A cart."""

    wheels: Annotated[list[Wheel], Field(min_length=1)]
    name: Text | None = None
    load: dict[str, Count] = field(default_factory=dict)


def problems_of(document: Any) -> list[str]:
    problems = Problems()
    assert read_as(Cart, document, problems) is None
    return list(problems)


def test_what_is_right_is_read_as_it_is_written() -> None:
    problems = Problems()
    cart = read_as(
        Cart, {"wheels": [{"size": 20, "weight": 3, "spare": None}], "name": None}, problems
    )
    assert cart == Cart([Wheel(20, weight=3)]) and not problems
    assert type(cart.wheels[0].weight) is int


@pytest.mark.parametrize(
    ("wheel", "problem"),
    [
        ({"size": 0}, "wheels[1].size = 0: want a positive integer"),
        ({"size": True}, "wheels[1].size = true: want a positive integer"),
        ({"size": 20.0}, "wheels[1].size = 20.0: want a positive integer"),
        ({"size": "20"}, 'wheels[1].size = "20": want a positive integer'),
        ({"size": None}, "wheels[1].size: is missing, want a positive integer"),
        ({"weight": float("nan")}, "wheels[1].weight = NaN: want a positive number"),
        ({"weight": False}, "wheels[1].weight = false: want a positive number"),
        ({"worn": 1}, "wheels[1].worn = 1: want a number from 0 to below 1"),
        ({"spokes": -1}, "wheels[1].spokes = -1: want an integer of 0 or more"),
        ({"spare": 1}, "wheels[1].spare = 1: want true or false"),
        ({"kind": 3}, "wheels[1].kind = 3: want one of disc, spoke"),
        (
            {"kind": "spokes"},
            "wheels[1].kind = \"spokes\": want one of disc, spoke (did you mean 'spoke'?)",
        ),
        ({"sizes": 3}, "wheels[1].sizes: is no field here (did you mean 'size'?)"),
        (
            {"colour": None},
            "wheels[1].colour: is no field here: "
            "want one of size, kind, weight, worn, spokes, spare",
        ),
        ({"kind": "disc", "spokes": 8}, "wheels[1].spokes = 8: a disc has none"),
        ({"size": None, "inches": 20}, "wheels[1].inches: is no field here: it is called size"),
    ],
)
def test_a_mistake_is_told_once_with_its_place(wheel: dict[str, Any], problem: str) -> None:
    assert problems_of({"wheels": [{"size": 20}, {"size": 20} | wheel]}) == [problem]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (3, "holds 3, want an object with the fields wheels, name, load"),
        ({}, "wheels: is missing, want a list"),
        ({"wheels": {}}, "wheels = {}: want a list"),
        ({"wheels": []}, "wheels = []: want a list that is not empty"),
        ({"wheels": [{"size": 1}], "name": " "}, 'name = " ": want a text that is not empty'),
        ({"wheels": [{"size": 1}], "load": []}, "load = []: want an object"),
        ({"wheels": [{"size": 1}], 3: 4}, "3: is no field here: want one of wheels, name, load"),
    ],
)
def test_so_are_those_of_what_holds_it(document: Any, problem: str) -> None:
    assert problems_of(document) == [problem]


def test_all_mistakes_are_told_and_the_fields_listed_once() -> None:
    strange = {"size": 0, "colour": 1, "gloss": 2, "kind": "disc", "spokes": 8}
    problems = problems_of({"wheels": [strange, strange], "name": 3})
    assert len(problems) == 9
    assert sum("want one of size" in problem for problem in problems) == 1


documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["wheels", "name", "load", "size", "kind", "spokes", "x"]), inner
        )
    ),
)


@given(documents)
def test_any_document_is_read_or_refused(document: Any) -> None:
    problems = Problems()
    assert (read_as(Cart, document, problems) is None) == bool(problems)


def test_a_schema_has_the_bounds_and_the_meanings() -> None:
    wheel = json_schema(Cart)["$defs"]["Wheel"]
    assert wheel["required"] == ["size"] and wheel["additionalProperties"] is False
    assert wheel["properties"]["size"] == {
        "type": "integer", "exclusiveMinimum": 0, "description": "In inches."
    }  # fmt: skip
    assert {"type": "null"} in wheel["properties"]["worn"]["anyOf"]
