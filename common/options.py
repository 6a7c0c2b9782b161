"""Options of commands: their types, bounds and shared help, written once for every command.

An option is a field of a frozen dataclass or a parameter of a command. Its help is its entry in the
docstring there or, where several commands have the option, that of its type here. Bounds are
those of files (`common.models`). Values out of bounds are no errors of parsing: a command asks
`option_problems` for them, and reports them together with what is wrong with its files.
"""

# No postponed annotations here: subclasses in other modules could not resolve them.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from cyclopts import Parameter, Token, convert

from lobra.common import models
from lobra.common.errors import Problems

T = TypeVar("T")


def _to_int(hint: Any, tokens: Sequence[Token]) -> int:
    """Return a whole number; 1.5 is none, and is not rounded."""
    (token,) = tokens
    try:
        return int(token.value)
    except ValueError:
        raise ValueError(f"{token.value!r} is not an integer") from None


@dataclass(frozen=True)
class Within:
    """Part of an option's type: its values are those of a type of `common.models`."""

    kind: Any


Int = Annotated[int, Parameter(converter=_to_int)]
PositiveInt = Annotated[Int, Within(models.PositiveInt)]
NumGpus = Annotated[Int, Within(models.NumGpus)]
NumTokens = Annotated[Int, Within(models.NumTokens)]
NonNegativeInt = Annotated[Int, Within(models.Count)]
PositiveNumber = Annotated[float, Within(models.Positive)]
AwaitHosts = Annotated[float, Within(models.NotNegative), Parameter(metavar="S")]
Switch = Literal["on", "off"]
Device = Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="What ranks run on.")]

ModelName = Annotated[str, Parameter(help="The base: tiny, 7B, 13B, 32B, 70B or a model folder.")]
TaskSetName = Annotated[str, Parameter(help="Name or path of the task set.", metavar="NAME")]
PlanName = Annotated[str, Parameter(help="Name or path of the plan.", metavar="NAME")]
DataDir = Annotated[Path, Parameter(help="Where data sets lie.")]
NumTasks = Annotated[PositiveInt | None, Parameter(help="Use the first N tasks only.", metavar="N")]
NumBuckets = Annotated[
    Int,
    Within(models.up_to(4096)),
    Parameter(help="The most buckets of a step.", metavar="N"),
]
Seed = Annotated[NonNegativeInt, Parameter(help="Of the run: added to every task's own seed.")]
TimeProfile = Annotated[
    Path | None, Parameter(help="CSV tp,seq_len,mbs,time; by default the model's.", metavar="CSV")
]
Json = Annotated[bool, Parameter(help="Print one JSON object on standard output.")]


def _in_any_case(hint: Any, tokens: Sequence[Token]) -> Any:
    """Return the choice that a text spells in any mixture of cases."""
    spelling = {value.casefold(): value for value in get_args(hint)}
    (token,) = tokens
    return convert(hint, [token.evolve(value=spelling.get(token.value.casefold(), token.value))])


#: Of a choice between texts: upper and lower case are the same.
ANY_CASE = Parameter(converter=_in_any_case)
#: Of a dataclass: its fields are the options of a command that takes one.
as_options = Parameter(name="*")
#: Of a field that is no option.
NOT_AN_OPTION = Parameter(parse=False)


@as_options
@dataclass(frozen=True, kw_only=True)
class LauncherOptions:
    """On which machines ranks are started.

    Parameters
    ----------
    server_addr
        Address of the first host.
    server_port
        Port on the first host.
    host_file
        DeepSpeed host file, for several machines.
    env_file
        Sourced on every host before starting.
    """

    server_addr: Annotated[str, Within(models.HostName)] | None = None
    server_port: Annotated[Int, Within(models.Port)] | None = None
    host_file: Path | None = None
    env_file: Path | None = None


THIS_MACHINE = LauncherOptions()
AWAIT_HOSTS_S = 300.0  # in which a machine that was only restarted is back


def option_problems(options: Any) -> Problems:
    """Return what is out of bounds in a dataclass of options."""
    return Problems(problem for _, problem in _out_of_bounds(options))


def within_bounds(options: T) -> tuple[T, Problems]:
    """Return the options with defaults in place of values out of bounds, and what was wrong.

    So what else is wrong can be looked for with them. A field without a default keeps its value.
    """
    wrong = dict(_out_of_bounds(options))
    defaults = {field.name: field.default for field in wrong if field.default is not MISSING}
    return replace(options, **defaults), Problems(wrong.values())  # type: ignore[type-var]


def option_name(field: Field[Any]) -> str:
    """Return the option of a dataclass's field."""
    return f"--{field.name.replace('_', '-')}"


def from_environment(
    variable: str, values: Mapping[str, T], environment: Mapping[str, str], problems: Problems
) -> T | None:
    """Return what the value of an environment variable stands for, None where it is not set.

    An unknown value is added to ``problems``.
    """
    text = environment.get(variable, "")
    if text and text.upper() not in values:
        problems.add(f"{variable}={text}: want one of {', '.join(values)}")
    return values.get(text.upper())


def _out_of_bounds(options: Any) -> Iterator[tuple[Field[Any], str]]:
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value):
            yield from _out_of_bounds(value)
        for one in value if isinstance(value, tuple) else (value,):
            for kind in _bounded(hints[field.name]) if one is not None else ():
                if wanted := models.refusal(kind, one):
                    yield field, f"{option_name(field)} {one}: want {wanted}"


def _bounded(hint: Any) -> Iterator[Any]:
    """Yield what values are to be within, anywhere in an option's type."""
    for part in get_args(hint):
        if isinstance(part, Within):
            yield part.kind
        else:
            yield from _bounded(part)
