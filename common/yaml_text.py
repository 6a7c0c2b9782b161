"""YAML texts as plain values: a parser that counts what it makes before it makes it."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import yaml

#: Of a document, aliases counted with all that they stand for: a run's config.yaml has about 105
#: for every task that the run has ever had, and 30,000 for ten rank maps of 1,024 ranks. PyYAML
#: takes a second for 40,000.
MOST_NODES = 400_000
MOST_LEVELS = 64  # of lists and mappings in each other
MOST_BITS = 4096  # of an integer, which may be written in base 60: 1,233 decimal digits
MOST_CHARACTERS = 1 << 22  # comments included, of which a second is enough for a million
#: What a document may hold. Dates are texts, as they are in JSON.
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map", "merge")
_TAG = "tag:yaml.org,2002:"
_NUMBER = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML text (one document).

    YAML 1.1 as PyYAML reads it, but ``1e-4`` is a number, a date a text, a doubled key an error.

    Raises
    ------
    ValueError
        If it is none, in our words, with line and column where they are known.
    """
    import yaml

    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"too large: {len(text)} characters, want at most {MOST_CHARACTERS}")
    try:
        return yaml.load(text, _loader())  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = f"not valid YAML: {error.problem or error.context}"
        raise ValueError(f"{_place(mark)}: {reason}" if mark else reason) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        character = f"the character U+{ord(text[error.position]):04X}"
        place = f"line {line}, column {column}"
        raise ValueError(f"{place}: not valid YAML: {character} is not allowed") from None
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


@cache
def _loader() -> type[yaml.SafeLoader]:
    """Return the parser's class, made when it is needed: importing PyYAML takes a while."""
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's parser with bounds, plain values only, and doubled keys an error."""

        def __init__(self, stream: Any) -> None:
            super().__init__(stream)
            self.num_nodes = 0
            self.level = 0
            self.sizes: dict[int, int] = {}  # nodes that a finished node stands for, by its id

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            """Return the next node, counted."""
            mark = self.peek_event().start_mark
            is_alias = self.check_event(yaml.AliasEvent)
            before = self.num_nodes
            self.num_nodes += 1
            self.level += 1
            if self.level > MOST_LEVELS:
                text = f"nested too deeply, want at most {MOST_LEVELS} levels"
                raise ValueError(f"{_place(mark)}: {text}")
            node = super().compose_node(parent, index)
            self.level -= 1
            if is_alias and id(node) not in self.sizes:
                raise ValueError(f"{_place(mark)}: not valid YAML: an alias of what it is in")
            self.num_nodes += self.sizes[id(node)] if is_alias else 0
            if self.num_nodes > MOST_NODES:
                text = f"more than {MOST_NODES} values, with those that aliases repeat"
                raise ValueError(f"{_place(mark)}: too large: {text}")
            self.sizes.setdefault(id(node), self.num_nodes - before)
            return node

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            """Return a node's value; what its text does not allow is an error with its place."""
            if node.tag.removeprefix(_TAG) not in _PLAIN:
                text = f"the tag {node.tag.replace(_TAG, '!!')!r} is not allowed, only plain values"
                raise ValueError(f"{_place(node.start_mark)}: not valid YAML: {text}")
            try:
                value = super().construct_object(node, deep)
                if isinstance(value, int) and value.bit_length() > MOST_BITS:
                    raise OverflowError(f"an integer of {value.bit_length()} bits")
                return value
            except (KeyError, OverflowError, IndexError) as error:
                raise ValueError(_no_value(node, str(error))) from None
            except ValueError as error:
                if str(error).startswith("line "):
                    raise
                raise ValueError(_no_value(node, str(error))) from None

    Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in resolvers if tag.removeprefix(_TAG) in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))
    Loader.add_constructor(f"{_TAG}map", _mapping)
    return Loader


def _no_value(node: yaml.Node, reason: str) -> str:
    kind = node.tag.removeprefix(_TAG)
    return f"{_place(node.start_mark)}: not valid YAML: no value of the kind {kind} ({reason})"


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == f"{_TAG}merge":
            continue
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            line = key_node.start_mark.line + 1
            raise ValueError(f"line {line}: the field {key!r} is given twice: keep one")
        if isinstance(key, str):
            seen.add(key)
    loader.flatten_mapping(node)
    return cast(dict[Any, Any], loader.construct_mapping(node, deep=True))
