"""The whole repository passes ruff (rules and layout) and mypy, as pyproject.toml sets them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = {
    "ruff-check": ["ruff", "check", "--quiet", "."],
    "ruff-format": ["ruff", "format", "--check", "--quiet", "."],
    "mypy": ["mypy", "--no-error-summary"],
}


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
