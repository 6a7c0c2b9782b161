"""The embedded corpus: four fine-tuning tasks of real text, mined from Python's standard library.

The source files of the running interpreter's library are parsed, never imported or run. Nothing is
fetched, and nothing is cut: lengths are as people wrote them, most short and a few very long.

====================  =====================================  ================================
task                  the model reads                        and writes
====================  =====================================  ================================
stdlib_docstring      a function's source                    its docstring
stdlib_signature      a docstring and a name                 the signature
stdlib_module         a module's outline                     what the module is for
stdlib_oneliner       the name of a function or class        the first sentence of its docstring
====================  =====================================  ================================
"""

from __future__ import annotations

import ast
import json
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic

EMBEDDED = ("stdlib_docstring", "stdlib_signature", "stdlib_module", "stdlib_oneliner")

# Tests, installed packages, tables of characters, and bundled or legacy programs.
_LEFT_OUT = frozenset(
    {
        *("test", "tests", "idle_test"),
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "_bundled"),
        *("encodings", "pydoc_data"),
        *("idlelib", "lib2to3", "turtledemo"),
    }
)

# Characters of no text; a docstring with one is a table or a joke.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_Function = ast.FunctionDef | ast.AsyncFunctionDef
Example = dict[str, str]


def ensure_corpus(data_dir: str | Path) -> dict[str, Path]:
    """Return the files of the four tasks in ``data_dir``, mined now if one is missing.

    The rows have ``instruction``, ``input`` and ``output``. The same interpreter version yields the
    same bytes. Several processes may do this at once.

    Raises
    ------
    ConfigError
        If this Python comes without its library's source files.
    """
    paths = {name: Path(data_dir) / f"{name}.jsonl" for name in EMBEDDED}
    if not all(path.is_file() for path in paths.values()):
        for name, examples in mine_corpus().items():
            lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
            if not paths[name].is_file():
                write_atomic(paths[name], "".join(lines))
    return paths


def corpus_texts() -> list[str]:
    """Return the texts of all four tasks, to train a tokenizer on."""
    return [
        text
        for name, examples in mine_corpus().items()
        for example in examples
        for text in ((example["instruction"], example["input"], example["output"]))
        if text
    ]


@lru_cache(maxsize=1)
def mine_corpus() -> dict[str, list[Example]]:
    """Return the examples of the four tasks by name, each example once.

    Raises
    ------
    ConfigError
        If this Python comes without its library's source files.
    """
    found: dict[str, dict[tuple[str, ...], Example]] = {name: {} for name in EMBEDDED}
    for module in _modules(Path(sysconfig.get_path("stdlib"))):
        for name, examples in zip(EMBEDDED, _mine(module), strict=True):
            for example in examples:
                found[name].setdefault(tuple(example.values()), example)
    corpus = {name: list(examples.values()) for name, examples in found.items()}
    if not all(corpus.values()):
        raise ConfigError(
            "the embedded tasks are mined from Python's own source files, and "
            f"{sysconfig.get_path('stdlib')} has none: use data of your own, or a Python that "
            "comes with its library's .py files"
        )
    return corpus


@dataclass(frozen=True)
class _Module:
    """A parsed source file: its dotted name and its lines."""

    name: str
    lines: list[str]
    tree: ast.Module


def _modules(folder: Path) -> Iterator[_Module]:
    """Yield the modules below a folder, in the order of their names."""
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in _LEFT_OUT and not f.startswith("config-")]
        paths += [Path(root, file) for file in files if file.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(folder).parts):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # the few files in another encoding, and templates that are not yet Python
        name = ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")
        yield _Module(name, source.split("\n"), tree)  # not at form feeds, as ast counts


def _mine(module: _Module) -> tuple[list[Example], ...]:
    """Return one module's examples of the four tasks, in the order of `EMBEDDED`."""
    docstrings, signatures, oneliners = [], [], []
    for owner, definition in _definitions(module.tree, module.name):
        text = _docstring(definition)
        if not text:
            continue
        name = f"{owner}.{definition.name}"
        oneliners.append(_example(f"What is {name} for?", "", _first_sentence(text)))
        if isinstance(definition, ast.ClassDef):
            continue
        signatures.append(
            _example(f"Write the signature of {definition.name}.", text, _signature(definition))
        )
        code = _code_without_docstring(module.lines, definition)
        if code:
            docstrings.append(_example("Write the docstring of this function.", code, text))
    summaries = []
    text, outline = _docstring(module.tree), "\n".join(_outline(module.tree))
    if text and outline:
        paragraph = text.strip().split("\n\n")[0]
        summaries.append(_example(f"What is the module {module.name} for?", outline, paragraph))
    return docstrings, signatures, summaries, oneliners


def _example(instruction: str, given: str, output: str) -> Example:
    return {"instruction": instruction, "input": given, "output": output}


def _definitions(node: ast.AST, owner: str) -> Iterator[tuple[str, _Function | ast.ClassDef]]:
    """Yield (dotted name of the owner, definition) of the functions and classes of a module.

    Functions inside functions are left out: they have no name that can be asked for.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield owner, child
        elif isinstance(child, ast.ClassDef):
            yield owner, child
            yield from _definitions(child, f"{owner}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, owner)


def _docstring(node: _Function | ast.ClassDef | ast.Module) -> str:
    text = ast.get_docstring(node) or ""
    return "" if _CONTROL.search(text) else text


def _first_sentence(text: str) -> str:
    """Return the first sentence of a docstring's first paragraph, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) ", paragraph, maxsplit=1)[0]


def _signature(function: _Function) -> str:
    keyword = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{keyword} {function.name}({ast.unparse(function.args)}){returns}:"


def _code_without_docstring(lines: list[str], function: _Function) -> str:
    """Return a function's source without docstring and indentation; "" if nothing is left."""
    docstring, *body = function.body
    if not body or docstring.lineno == function.lineno or docstring.end_lineno is None:
        return ""
    if body[0].lineno <= docstring.end_lineno:  # more than the docstring on its line
        return ""
    head = lines[function.lineno - 1 : docstring.lineno - 1]
    tail = lines[docstring.end_lineno : function.end_lineno]
    return textwrap.dedent("\n".join(head + tail)).strip()


def _outline(tree: ast.Module) -> Iterator[str]:
    """Yield the signature of every class, method and function, a line each, indented by depth."""
    for owner, definition in _definitions(tree, ""):
        indent = "    " * owner.count(".")
        if isinstance(definition, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in definition.bases)
            yield f"{indent}class {definition.name}" + (f"({bases}):" if bases else ":")
        else:
            yield indent + _signature(definition)
