"""The one error a user can cause: mistakes in what was given, all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class ConfigError(ValueError):
    """A user's mistakes in a configuration, a data file or a command line.

    Each problem names the file, the field, the value and what would be right. A command line
    prints ``str(error)`` without a traceback and exits 2.

    Parameters
    ----------
    problems
        One problem or several. A sequence without any is a bug of the caller.

    Raises
    ------
    AssertionError
        If ``problems`` holds no problem.
    """

    problems: tuple[str, ...]

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        assert self.problems, "a ConfigError without a problem"
        super().__init__(self.problems)

    def __str__(self) -> str:
        """Return the only problem, or all of them as a numbered list."""
        if len(self.problems) == 1:
            return self.problems[0]
        lines = [f"{len(self.problems)} problems:"]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        return "\n".join(lines)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...]]]:
        """Pickle by the problems, so that the error survives the way between processes."""
        return type(self), (self.problems,)


def first_problems(problems: Iterable[str], limit: int = 20) -> list[str]:
    """Return at most ``limit`` problems and, if there are more, a line that counts the rest."""
    every = list(problems)
    if len(every) <= limit:
        return every
    return [*every[:limit], f"... and {len(every) - limit} more of this kind"]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'rank'?)"`` for the known word nearest to ``word``, or ``""``."""
    import difflib

    choices = {choice.casefold(): choice for choice in known}
    near = difflib.get_close_matches(word.casefold(), choices, n=1, cutoff=0.6)
    return f" (did you mean {choices[near[0]]!r}?)" if near else ""
