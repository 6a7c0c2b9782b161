"""The one error a user can cause: mistakes in what was given, all of them at once."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
MOST_LINES = 20  # of mistakes that a command prints
#: Of them, where there are more mistakes than lines: so many in full, the others count the rest.
LINES_IN_FULL = 15
LINES_OF_KINDS = MOST_LINES - LINES_IN_FULL - 1
KINDS_COUNTED = 100  # a file of a million different mistakes must not fill the memory
#: Of one mistake, so that a value or a name of a megabyte is cut wherever a message shows it; two
#: paths of the longest names systems allow, with values and remedy, have fewer.
MOST_CHARACTERS = 2000
OTHER_KINDS = "..."


class Problems(Sequence[str]):
    """Mistakes found so far: at most twenty in full, and of the rest how many of each kind.

    As a sequence, those in full, in the order they were found. Two mistakes are of one kind if they
    differ in numbers and values only. Where they are too many, the lines are shared by the kinds,
    so that a thousand bad rows of one file do not hide what is wrong with another.

    Parameters
    ----------
    problems
        The first ones.
    """

    def __init__(self, problems: Iterable[str] = ()) -> None:
        self._kept: list[tuple[str, str]] = []  # (kind, problem)
        self._rest: Counter[str] = Counter()  # by kind
        self += problems

    def add(self, problem: str) -> None:
        """Note one more mistake: a line of printable characters, the middle of a long one cut."""
        problem = _one_line(problem)
        self._kept.append((_kind(problem), problem))
        self._shorten()

    def _shorten(self) -> None:
        """Count what does not fit in full, of the kind that has most lines the last one."""
        if self.total <= MOST_LINES:
            return
        while len(self._kept) > LINES_IN_FULL:
            lines = Counter(kind for kind, _ in self._kept)
            most = max(lines.values())
            late = max(i for i, (kind, _) in enumerate(self._kept) if lines[kind] == most)
            self._count(self._kept.pop(late)[0], 1)

    def __iadd__(self, others: Iterable[str]) -> Problems:
        """Note the mistakes of another collection, with its counts if it is a `Problems`."""
        for problem in others:
            self.add(problem)
        if isinstance(others, Problems):
            for kind, count in others._rest.items():
                self._count(kind, count)
            self._shorten()
        return self

    def prefixed(self, prefix: str) -> Problems:
        """Return these mistakes with a text before each."""
        return self.changed(lambda problem: prefix + problem)

    def changed(self, change: Callable[[str], str]) -> Problems:
        """Return these mistakes with their texts changed."""
        result = Problems(change(problem) for problem in self)
        for kind, count in self._rest.items():
            result._count(kind if kind == OTHER_KINDS else _kind(change(kind)), count)
        return result

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the mistakes of the `ConfigError` that ends a block, and go on after the block.

        What was noted before, because something else stumbled over it too, is not noted twice.
        """
        try:
            yield
        except ConfigError as error:
            self += error.problems.beyond(self)

    def beyond(self, others: Iterable[str]) -> Problems:
        """Return these mistakes without those that are among others."""
        known = set(others)
        result = Problems(problem for problem in self if problem not in known)
        result._rest = Counter(self._rest)
        return result

    def result_of(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return function(...), or None after noting the mistakes of its `ConfigError`."""
        with self.noted():
            return function(*args, **kwargs)
        return None

    def raise_if_any(self) -> None:
        """Raise a `ConfigError` of them, if there are any."""
        if self._kept:
            raise ConfigError(self)

    @property
    def total(self) -> int:
        """How many mistakes were found in all."""
        return len(self._kept) + self._rest.total()

    @property
    def counts(self) -> tuple[tuple[str, int], ...]:
        """(kind, how many) of those that are not there in full, the most frequent first."""
        kinds = [entry for entry in self._rest.most_common() if entry[0] != OTHER_KINDS]
        shown, others = kinds[:LINES_OF_KINDS], kinds[LINES_OF_KINDS:]
        if others or self._rest[OTHER_KINDS]:
            others = kinds[LINES_OF_KINDS - 1 :]
            count = sum(n for _, n in others) + self._rest[OTHER_KINDS]
            shown = [*kinds[: LINES_OF_KINDS - 1], (OTHER_KINDS, count)]
        return tuple(shown)

    def __getitem__(self, index: Any) -> Any:
        return [problem for _, problem in self._kept][index]

    def __len__(self) -> int:
        return len(self._kept)

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence holds the same texts, and all of them."""
        rest = other._rest if isinstance(other, Problems) else Counter()
        return isinstance(other, Sequence) and list(self) == list(other) and self._rest == rest

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        """Return the only mistake, or a numbered list of at most twenty lines."""
        if self.total == 1:
            return self[0]
        lines = [f"{self.total} problems:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self, 1)]
        if self._rest:
            lines.append(f"  and {self._rest.total()} more:")
            lines += [
                f"  {count} of other kinds" if kind == OTHER_KINDS else f"  {count} like: {kind}"
                for kind, count in self.counts
            ]
        return "\n".join(lines)

    def _count(self, kind: str, count: int) -> None:
        known = kind in self._rest or len(self._rest) < KINDS_COUNTED
        self._rest[kind if known else OTHER_KINDS] += count


class ConfigError(ValueError):
    """A user's mistakes in a configuration, a data file or a command line.

    Each problem names the file, the field, the value and what would be right. A command line
    prints ``str(error)`` without a traceback and exits 2.

    Parameters
    ----------
    problems
        One problem or several. A collection without any is a bug of the caller.

    Raises
    ------
    AssertionError
        If ``problems`` holds no problem.
    """

    problems: Problems

    def __init__(self, problems: str | Iterable[str]) -> None:
        if isinstance(problems, str):
            problems = (problems,)
        self.problems = problems if isinstance(problems, Problems) else Problems(problems)
        assert self.problems, "a ConfigError without a problem"
        super().__init__(self.problems)

    def __str__(self) -> str:
        """Return the only problem, or a numbered list of them (see `Problems`)."""
        return str(self.problems)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[Problems]]:
        """Pickle by the problems, so that the error survives the way between processes."""
        return type(self), (self.problems,)


class MachineError(RuntimeError):
    """What the machine denied or broke: no user's mistake, and no bug of ours.

    A command line prints ``str(error)`` without a traceback and exits 1.
    """


_VALUES = re.compile(
    r"""
      "(?:[^"\\]|\\.)*"               # a text as JSON has it
    | "[^"]*?\.\.\.(?=:\s|$)          # or as `show` cuts it
    | (?<!\w)'(?:[^'\\]|\\.)*'(?!\w)  # or as Python has it; no apostrophe
    | (?<=\s=\s).+?(?=:\s[a-z]|$)     # another value of a field
    """,
    re.VERBOSE,
)
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w)")


def _one_line(text: str) -> str:
    """Return a text without what a terminal would obey, and without the middle of a long one."""
    if len(text) > MOST_CHARACTERS:
        part = MOST_CHARACTERS // 2
        text = f"{text[:part]} [...] {text[-part:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split("\n")))


def _kind(problem: str) -> str:
    """Return what a mistake has in common with others of its kind: its text without values."""
    text = _NUMBER.sub("N", _VALUES.sub("...", problem))
    return text if len(text) <= 160 else f"{text[:157]}..."


def without_values(problem: str) -> str:
    """Return a problem without the values it quotes: of another's data nothing is to be told."""
    return _VALUES.sub("...", problem)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'rank'?)"`` for the known word nearest to ``word``, or ``""``."""
    import difflib

    choices = {choice.casefold(): choice for choice in known}
    near = difflib.get_close_matches(word.casefold(), choices, n=1, cutoff=0.6)
    return f" (did you mean {choices[near[0]]!r}?)" if near else ""


def show(value: Any) -> str:
    """Return a value as a file spells it, cut to a line's length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}" if isinstance(value, list | dict) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
