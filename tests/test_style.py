"""The repository passes ruff and mypy, as pyproject.toml sets them; docstrings are NumPy's."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_chain import CHAIN

CHECKS = {
    "ruff-check": ["ruff", "check", "--quiet", "."],
    "ruff-format": ["ruff", "format", "--check", "--quiet", "."],
    "mypy": ["mypy", "--no-error-summary"],
}
FOLDERS = (*CHAIN, "lobra/commands", "experiments", "benchmarks", "tests")
OTHER_SECTION = re.compile(
    r"^\s*(Args|Arguments|Returns|Raises|Yields|Attributes|Examples?):\s*$", re.M
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("check", CHECKS)
def test_style(check: str, project_root: Path) -> None:
    module, *arguments = CHECKS[check]
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{check}:\n{result.stdout}{result.stderr}"


def documented_otherwise(source: str) -> list[str]:
    """Return the names of what has a docstring with sections of another grammar than NumPy's."""
    return [
        getattr(node, "name", "module")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, DOCUMENTED) and OTHER_SECTION.search(ast.get_docstring(node) or "")
    ]


def test_docstrings_have_one_grammar(project_root: Path) -> None:
    paths = [path for folder in FOLDERS for path in (project_root / folder).rglob("*.py")]
    assert len(paths) > 100
    wrong = {str(path): documented_otherwise(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_check_of_docstrings_finds_sections() -> None:
    other = 'def f():\n    """Do.\n\n    Args:\n        x: y\n    """'
    ours = 'def g():\n    """Do: this.\n\n    Returns\n    -------\n    It.\n    """'
    assert documented_otherwise(f"{other}\n{ours}\n") == ["f"]
