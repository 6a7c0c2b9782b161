"""JSON and YAML files written by people: parsed strictly, with the place of every mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

from lobra.common.errors import ConfigError


def read_document(path: Path) -> Any:
    """Return the plain values (dict, list, str, int, float, bool, None) of a JSON or YAML file.

    A file whose name ends in ``.json`` is JSON, any other YAML.

    Raises
    ------
    ConfigError
        If the file cannot be read or parsed, or gives a field twice; with file, line and column.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{path}: not UTF-8 text ({where})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _parse_json(text) if path.suffix == ".json" else _parse_yaml(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
        ) from None
    except _DocumentError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


class _DocumentError(ValueError):
    """A document that cannot be read, with the place in its text."""


def _parse_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise _DocumentError(f"the field {key!r} is given twice in one object: keep one")
            seen[key] = value
        return seen

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except (json.JSONDecodeError, _DocumentError):
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise _DocumentError(str(error)) from None


def _parse_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 as PyYAML reads it, but with ``1e-4`` a number and doubled keys an error."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise _DocumentError(f"line {line}: the field {key!r} is given twice: keep one")
            if isinstance(key, str):
                seen.add(key)
        loader.flatten_mapping(node)
        return cast(dict[Any, Any], loader.construct_mapping(node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise _DocumentError(f"{place}not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        place = f"line {line}, column {column}: "
        character = f"the character U+{ord(text[error.position]):04X}"
        raise _DocumentError(f"{place}not valid YAML: {character} is not allowed") from None
    except yaml.YAMLError as error:
        raise _DocumentError(f"not valid YAML: {' '.join(str(error).split())}") from None
