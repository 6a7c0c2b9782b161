"""What the pages of docs name is there: files, packages' modules, commands, benchmarks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.__main__ import SUBJECTS
from lobra.cli import COMMANDS
from tests.test_chain import CHAIN

FOLDERS = "|".join(
    (*CHAIN, "benchmarks", "docs", "examples", "experiments", "lobra", "scripts", "tests",
     "trainer_config")
)  # fmt: skip
PATH = re.compile(
    rf"\b(?:{FOLDERS})/[\w./-]*\w\.(?:py|sh|md|json|yaml|csv)\b|\b(?:{FOLDERS})/[\w/]+/(?=`)"
)
MODULE = re.compile(rf"`(?:lobra\.)?({'|'.join(CHAIN)})\.(?!md\b|py\b)([a-z_]+)\b")
COMMAND = re.compile(r"\blobra ((?:data|experiment|profile) [a-z]+|[a-z]+)\b(?![ ]*=)")
BENCHMARK = re.compile(r"python -m benchmarks ([a-z]\w*)")


@pytest.fixture(scope="module")
def pages(project_root: Path) -> dict[str, str]:
    """The text of README and of every page that is kept up to date (results are dated)."""
    paths = [project_root / "README.md", *sorted((project_root / "docs").glob("*.md"))]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def test_paths_exist(pages: dict[str, str], project_root: Path) -> None:
    named = {(page, path) for page, text in pages.items() for path in PATH.findall(text)}
    assert len(named) > 60
    assert {(page, path) for page, path in named if not (project_root / path).exists()} == set()


def test_modules_exist(pages: dict[str, str], project_root: Path) -> None:
    named = {(page, *parts) for page, text in pages.items() for parts in MODULE.findall(text)}
    assert len(named) > 5
    assert {name for name in named if not is_module(project_root / name[1] / name[2])} == set()


def test_the_table_of_packages_names_modules(pages: dict[str, str], project_root: Path) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", pages["architecture.md"], re.MULTILINE))
    assert list(rows) == list(CHAIN)
    named = [
        (package, name) for package in CHAIN for name in re.findall(r"`([a-z_]+)/?`", rows[package])
    ]
    assert [pair for pair in named if not is_module(project_root / pair[0] / pair[1])] == []


def test_commands_exist(pages: dict[str, str]) -> None:
    code = [text for page in pages.values() for text in re.findall(r"`+([^`]*)`+", page)]
    named = {words for text in code for words in COMMAND.findall(text)}
    assert len(named) > 10 and named <= set(COMMANDS)
    subjects = {subject for page in pages.values() for subject in BENCHMARK.findall(page)}
    assert subjects and subjects <= set(SUBJECTS)


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_links_lead_to_pages_and_headings(pages: dict[str, str], project_root: Path) -> None:
    def anchors(text: str) -> set[str]:
        headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}

    links = []
    for name, text in pages.items():
        folder = project_root if name == "README.md" else project_root / "docs"
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            path, _, anchor = target.partition("#")
            linked = folder / path if path else folder / name
            links.append(target)
            assert linked.exists(), (name, target)
            assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target
    assert len(links) > 40


def test_the_messages_of_troubleshooting_are_the_codes(
    pages: dict[str, str], project_root: Path
) -> None:
    page = pages["troubleshooting.md"]
    messages = [text.split("\u2026") for text in re.findall(r"^- `([^`]+)`:", page, re.MULTILINE)]
    messages += [["does not fit this machine"]]
    said = [text for package in (*CHAIN, "lobra") for text in _texts(project_root / package)]
    said += [path.read_text() for path in (project_root / "scripts").glob("*.sh")]
    for parts in messages:
        wanted = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(wanted.search(text) for text in said), parts
    assert len(messages) > 30


def _texts(folder: Path) -> Iterator[str]:
    """Yield every text that a package's modules write, holes of f-strings and of logging empty."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value for part in node.values if isinstance(part, ast.Constant))
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub("%[sd]", "", node.value)
