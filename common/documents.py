"""The fence around files that people write: what reads them raises `ConfigError` and nothing else.

Every reader of the project takes its bytes and its values from here, so a file that is no file, too
large, not UTF-8, nested without end or not JSON is refused in the same words everywhere, before
it costs more than its limits.
"""

from __future__ import annotations

import csv
import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError
from lobra.common.yaml_text import parse_yaml

#: Of a file that is read at once, data sets and logs of runs apart; the largest in use are lengths
#: of a million sequences, some megabytes.
MOST_BYTES = 1 << 28
MOST_LEVELS = 64  # of lists and objects in each other; ours have six
MOST_DIGITS = 1000  # of an integer; a 64-bit one has 19, and floats end at 309

#: What parsers raise beside their own errors: for a date of month 13, an integer of 5,000 digits.
_PARSING = (ValueError, TypeError, LookupError, ArithmeticError, EOFError, csv.Error)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Have a block that reads a file raise a `ConfigError` with its path instead of other errors.

    Raises
    ------
    ConfigError
        If the block fails because of what the file is or holds.
    """
    try:
        with parsing(path):
            yield
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextmanager
def parsing(path: Path) -> Iterator[None]:
    """Have a block that makes sense of a file raise a `ConfigError` with its path, if it has none.

    Raises
    ------
    ConfigError
        If the block fails because of what the file holds.
    """
    try:
        yield
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{path}: not UTF-8 text ({place}): save it as UTF-8") from None
    except KeyError as error:
        raise ConfigError(f"{path}: damaged: lacks {error}") from None
    except (RecursionError, MemoryError):
        raise ConfigError(f"{path}: nested too deeply, or too large for this machine") from None
    except _PARSING as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: {reason}") from None


def check_regular(path: Path, most_bytes: int | None = None) -> None:
    """Check that a path is a file with an end: no pipe, socket or device.

    Raises
    ------
    ConfigError
        If it is not, or is larger than ``most_bytes``.
    """
    with reading(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: cannot be read: it is no regular file, want one")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ConfigError(
            f"{path}: cannot be read: it has {found.st_size} bytes, want at most {most_bytes}"
        )


def read_bytes(path: Path, most_bytes: int | None = MOST_BYTES) -> bytes:
    """Return what a file holds; ConfigError if it is none or has more than ``most_bytes``."""
    check_regular(path, most_bytes)
    with reading(path):
        return path.read_bytes()


def read_text(path: Path, most_bytes: int | None = MOST_BYTES) -> str:
    """Return a file's text, UTF-8 with or without a byte order mark; ConfigError if it has none."""
    data = read_bytes(path, most_bytes)
    with reading(path):
        return data.decode("utf-8-sig")


def read_document(path: Path) -> Any:
    """Return the plain values (dict, list, str, int, float, bool, None) of a JSON or YAML file.

    A file whose name ends in ``.json`` is JSON, any other YAML.

    Raises
    ------
    ConfigError
        If the file cannot be read or parsed, or gives a field twice; with file, line and column.
    """
    return _document(path, parse_json if path.suffix == ".json" else parse_yaml)


def read_json(path: Path) -> Any:
    """Return the plain values of a JSON file, whatever its name (see `read_document`)."""
    return _document(path, parse_json)


def _document(path: Path, parse: Callable[[str], Any]) -> Any:
    text = read_text(path)
    with reading(path):
        return parse(text)


def parse_json(text: str, takes_doubled_fields: bool = False) -> Any:
    """Return the plain values of a JSON text.

    Raises
    ------
    ValueError
        If it is none, gives a field twice in one object (unless that is taken: the last counts), or
        has more levels or digits than `MOST_LEVELS` and `MOST_DIGITS`; in our words, with line and
        column where they are known.
    """

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ValueError(f"the field {key!r} is given twice in one object: keep one")
            seen[key] = value
        return seen

    try:
        hook = None if takes_doubled_fields else mapping
        value = json.loads(text, object_pairs_hook=hook, parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    check_levels(value)
    return value


_TOO_DEEP = f"nested too deeply, want at most {MOST_LEVELS} levels"


def check_levels(value: Any) -> None:
    """Raise ValueError if lists and objects lie in each other more than `MOST_LEVELS` deep."""
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        nested = [item for item in level if isinstance(item, dict | list)]
        level = [x for item in nested for x in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, want at most {MOST_DIGITS}")
    return int(digits)
