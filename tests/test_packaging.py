"""What is installed is what was tested, and the base installation is without torch."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lobra.cli import main

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "safetensors", "tensorboard"}


@pytest.fixture(scope="module")
def setup(project_root: Path) -> dict[str, Any]:
    """Return the arguments of setup.py's call that are literals."""
    tree = ast.parse((project_root / "setup.py").read_text())
    (call,) = (n for n in ast.walk(tree) if isinstance(n, ast.Call) and "setup" in ast.dump(n.func))
    names = ("install_requires", "extras_require")
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in names}


def test_a_base_installation_asks_for_no_package_of_training(setup: dict[str, Any]) -> None:
    base = {Requirement(text).name for text in setup["install_requires"]}
    train = {Requirement(text).name for text in setup["extras_require"]["train"]}
    assert not base & HEAVY and train >= HEAVY


def test_the_versions_that_were_tested_are_versions_that_are_asked_for(
    setup: dict[str, Any], project_root: Path
) -> None:
    lines = (project_root / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = setup["extras_require"]
    asked = ("train", "serve", "quantised", "dev")
    for text in [*setup["install_requires"], *(text for name in asked for text in extras[name])]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(tested[canonicalize_name(requirement.name)]), text


def test_the_container_installs_them(project_root: Path) -> None:
    text = (project_root / "Containerfile").read_text().replace("\\\n", "")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    assert [word for word, _ in steps] == [
        "FROM", "RUN", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD"
    ]  # fmt: skip
    assert re.fullmatch(r"python:3\.(11|12|13)-slim", steps[0][1])
    assert "--constraint /opt/lobra/constraints.txt" in steps[3][1]


def test_a_shell_completes_commands_and_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "new" / "lobra"
    assert main(["--install-completion", "--shell", "bash", "--output", str(script)]) == 0
    assert capsys.readouterr().out == f"written: {script}; open a new bash to use it\n"
    (tmp_path / "file").touch()
    words = ["--install-completion", "--shell", "bash", "--output", str(tmp_path / "file" / "x")]
    assert main(words) == 2
    assert "--output: " in capsys.readouterr().err
    ask = (
        f"source {script}\nCOMP_WORDS=(lobra $1 $2)\nCOMP_CWORD=$#\n_lobra\necho ${{COMPREPLY[@]}}"
    )
    for typed, offered in (
        (("tr",), "train"),
        (("plan", "--sweep"), "--sweep-gpus"),
        (("train", "--strat"), "--strategy-config"),
        (("--inst",), "--install-completion"),
    ):
        done = subprocess.run(["bash", "-c", ask, "bash", *typed], capture_output=True, text=True)
        assert offered in done.stdout.split(), done.stderr
