"""Models of files: dataclasses a document is validated against, its mistakes told in our words.

A model is a frozen dataclass derived from `FileModel`. Its fields have the types of this module,
which carry the bounds of a value and the words for what is wanted instead of a wrong one, and below
each field stands what it means: that is its description in the JSON Schema, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from lobra.common.documents import read_document
from lobra.common.errors import Problems, did_you_mean, show

T = TypeVar("T")
Place = tuple[int | str, ...]  # of a value in a document: names of fields and numbers in lists

_ABSENT = object()
_NULL = {"type": "null"}
_ABOUT = {"description", "default"}  # of a field in a JSON Schema
_PLAIN_TYPES = {
    "list_type": "a list",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "an object",
    "string_type": "a text",
}


def wanted(text: str, choices: Sequence[str] = ()) -> PydanticCustomError:
    """Return the error of a value that is not what is wanted, or none of some choices."""
    return PydanticCustomError("wanted", text, {"choices": choices})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Wanted:
    """Part of a type: what is wanted instead of a value that the rest of the type refuses."""

    text: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the type, with one error of ours for all of its own."""
        return core_schema.custom_error_schema(
            handler(source), custom_error_type="wanted", custom_error_message=self.text
        )


@dataclass(frozen=True)
class OneOf:
    """Part of a type: one of these texts."""

    choices: tuple[str, ...]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the choices; the nearest one is suggested for another text."""
        return core_schema.custom_error_schema(
            core_schema.literal_schema(list(self.choices)),
            custom_error_type="wanted",
            custom_error_message=f"one of {', '.join(self.choices)}",
            custom_error_context={"choices": self.choices},
        )


@dataclass(frozen=True)
class AtMost:
    """Part of a type: a number up to ``most``, which arithmetic or a machine still bears."""

    most: int | float
    why: str = ""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema of the type, with the bound checked after all of its own."""

        def check(value: Any) -> Any:
            if value > self.most:
                raise wanted(f"at most {self.most:,}{f' ({self.why})' if self.why else ''}")
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the type's JSON Schema with the bound, if an editor can hold it exactly."""
        written = handler(schema)
        return written if self.most > 2**53 else {**written, "maximum": self.most}


# A number is checked as a float, but stays as it is written: 16 does not become 16.0.
_AS_WRITTEN = WrapValidator(lambda value, check: (check(value), value)[1])
_FINITE = Field(strict=True, allow_inf_nan=False)
_IN_64_BITS = AtMost(2**63 - 1, "64 bits")


def at_least(least: int) -> Any:
    """Return the type of integers of ``least`` and more."""
    text = f"an integer of {least} or more"
    return Annotated[int, Field(strict=True, ge=least), Wanted(text), _IN_64_BITS]


PositiveInt = Annotated[int, Field(strict=True, gt=0), Wanted("a positive integer"), _IN_64_BITS]
Count = Annotated[int, Field(strict=True, ge=0), Wanted("an integer of 0 or more"), _IN_64_BITS]


def up_to(most: int) -> Any:
    """Return the type of integers from 1 to ``most``."""
    return Annotated[PositiveInt, AtMost(most)]


#: Of a plan: planning takes minutes from some thousands on, and nobody has trained on more.
NumGpus = Annotated[PositiveInt, AtMost(2**14)]
#: A number of tokens of one sequence or micro-batch: no model has a longer context.
NumTokens = Annotated[PositiveInt, AtMost(2**24)]
#: Of an adapter.
Rank = Annotated[PositiveInt, AtMost(2**16, "no linear of a model is wider")]
Port = Annotated[PositiveInt, AtMost(2**16 - 1, "ports have 16 bits")]
Number = Annotated[float, _FINITE, _AS_WRITTEN, Wanted("a number")]
Positive = Annotated[float, _FINITE, Field(gt=0), _AS_WRITTEN, Wanted("a positive number")]
NotNegative = Annotated[float, _FINITE, Field(ge=0), _AS_WRITTEN, Wanted("a number of 0 or more")]
#: Of a whole, but never all of it.
Share = Annotated[
    float, _FINITE, Field(ge=0, lt=1), _AS_WRITTEN, Wanted("a number from 0 to below 1")
]
Flag = Annotated[bool, Field(strict=True), Wanted("true or false")]
Text = Annotated[str, Field(strict=True, pattern=r"\S"), Wanted("a text that is not empty")]
#: That no program takes for an option.
HostName = Annotated[
    str,
    Field(strict=True, pattern=r"^[A-Za-z0-9_:][A-Za-z0-9_.:@%-]{0,254}$"),
    Wanted("a host's name or address"),
]
FolderName = Annotated[
    str,
    Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}$"),
    Wanted(
        "a name of at most 100 letters, digits and ._+- that starts with a letter, digit or _ "
        "(it becomes a folder)"
    ),
]


@dataclass(frozen=True)
class Mistake:
    """Stands in a document for a value that is wrong by what is beside it.

    Attributes
    ----------
    text
        What is wrong with it; nothing is said where it is empty.
    value
        As it was given, if the message is to show it.
    once
        More to say, the first time that a document has such a mistake.
    """

    text: str
    value: Any = _ABSENT
    once: str = ""


class FileModel:
    """An object in a file. A field that is null is one that is not given."""

    __pydantic_config__ = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def stranger(cls, name: str) -> tuple[str | None, str]:
        """Return what a field that is none was meant to be, if it is known, and what to say."""
        return None, did_you_mean(name, _names(cls))

    @classmethod
    def contradictions(cls, given: Mapping[str, Any]) -> Mapping[str, Mistake]:
        """Return the mistakes, by field, that only several of the file's values together make.

        The values are as the file has them, of whatever types, the names of whatever fields.
        """
        return {}

    @classmethod
    def implied(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what required fields are by the file's other values, where they are not given."""
        return {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema of the dataclass, which is shown the fields that are given."""
        return core_schema.no_info_before_validator_function(cls._given, handler(source))

    @classmethod
    def _given(cls, value: Any) -> dict[str, Any]:
        names = _names(cls)
        if not isinstance(value, dict):
            raise wanted(f"an object with the fields {', '.join(names)}")
        written = {str(name): item for name, item in value.items() if item is not None}
        given = {**dict.fromkeys(_required(cls), _ABSENT), **cls.implied(written), **written}
        given |= cls.contradictions(written)
        for name in [str(name) for name in value if name not in names]:
            meant, hint = cls.stranger(name)
            if meant in names and given.get(meant, _ABSENT) is _ABSENT:
                given[meant] = Mistake("")
            listing = "" if hint else f": want one of {', '.join(names)}"
            given[name] = Mistake(f"is no field here{hint}", once=listing)
        return given


def read_as(model: type[T], document: Any, problems: Problems) -> T | None:
    """Return the value that a document describes; None, its mistakes noted, if it has any."""
    try:
        adapter = _adapter(model)  # type: ignore[arg-type]  # a class is hashable
        return cast(T, adapter.validate_python(document))
    except ValidationError as error:
        said: set[str] = set()
        for found in error.errors(include_url=False):
            value = found["input"]
            if not isinstance(value, Mistake):
                problems.add(_problem(found))
            elif value.text:
                once = "" if value.once in said else value.once
                said.add(value.once)
                problems.add(_sentence(found["loc"], value.value, value.text + once))
        return None


def refusal(kind: Any, value: Any) -> str | None:
    """Return what is wanted instead of a value, None if a type of this module takes it."""
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        return error.errors(include_url=False)[0]["msg"]
    return None


def load_as(model: type[T], path: Path) -> T:
    """Return the value that a JSON or YAML file describes.

    Raises
    ------
    ConfigError
        With every mistake of the file.
    """
    problems = Problems()
    value = read_as(model, read_document(path), problems)
    problems.prefixed(f"{path}: ").raise_if_any()
    return cast(T, value)


def json_schema(model: type) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the files that a model describes."""
    schema = _adapter(model).json_schema(schema_generator=_SchemaWriter)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _SchemaWriter(GenerateJsonSchema):
    """Lets the fields of a `FileModel` be null, and makes no titles of their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> JsonSchemaValue:
        written = super().dataclass_schema(schema)
        fields = written["properties"]
        for name in fields.keys() - set(written.get("required", ())):
            about = {key: fields[name].pop(key) for key in _ABOUT & fields[name].keys()}
            choices = fields[name].get("anyOf", [fields[name]])
            if _NULL not in choices:
                choices = [*choices, _NULL]
            fields[name] = {"anyOf": choices, **about}
        return written


def _place_name(place: Place) -> str:
    """Return a value's place as people write it: ``task[0].rank``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _names(model: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(model))


def _required(model: Any) -> tuple[str, ...]:
    without = [f for f in fields(model) if f.default is MISSING and f.default_factory is MISSING]
    return tuple(field.name for field in without)


def _problem(found: ErrorDetails) -> str:
    value, text = found["input"], found["msg"]
    text = _PLAIN_TYPES.get(found["type"], text)
    if found["type"] == "wanted" or found["type"] in _PLAIN_TYPES:
        choices = found.get("ctx", {}).get("choices", ())
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        text = f"want {text}{hint}"
    if found["type"] == "missing":
        return f"{_place_name(found['loc'])}: is missing, want a value"
    if found["type"] == "value_error":  # of a check, whose text tells the value itself
        return f"{_place_name(found['loc'])}: {found['ctx']['error']}"
    if value is _ABSENT:
        return f"{_place_name(found['loc'])}: is missing, {text}"
    return _sentence(found["loc"], value, text)


def _sentence(place: Place, value: Any, text: str) -> str:
    if not place:
        return f"holds {show(value)}, {text}"
    shown = "" if value is _ABSENT else f" = {show(value)}"
    return f"{_place_name(place)}{shown}: {text}"
