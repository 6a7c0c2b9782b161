"""The two tiers: what the default one leaves out, and what it draws."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiers import ALL, DEFAULT, examples

TESTS = """
import pytest
@pytest.mark.long
def test_long(): pass
@pytest.mark.gpu
def test_gpu(): pass
def test_short(): pass
"""


@pytest.mark.parametrize(
    ("options", "ran"),
    [([], "1 passed, 1 skipped, 1 deselected"), (["--all"], "2 passed, 1 skipped")],
)
def test_long_tests_are_left_to_all_and_those_of_gpus_to_gpus(
    options: list[str], ran: str, tmp_path: Path, project_root: Path
) -> None:
    for name in ("conftest.py", "tiers.py", "__init__.py"):
        (tmp_path / "tests").mkdir(exist_ok=True)
        (tmp_path / "tests" / name).write_bytes((project_root / "tests" / name).read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((project_root / "pyproject.toml").read_bytes())
    (tmp_path / "tests" / "test_tiny.py").write_text(TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ran in done.stdout


def test_the_tier_says_how_many_examples_are_drawn(pytestconfig: pytest.Config) -> None:
    everything = pytestconfig.getoption("--all")
    assert settings.get_current_profile_name() == (ALL if everything else DEFAULT)
    assert settings().derandomize is not everything
    assert settings().deadline is None
    assert examples(7, 70).max_examples == (70 if everything else 7)
