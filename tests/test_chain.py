"""The packages form a chain: each imports only those to its left, wherever the import stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHAIN = ("tasks", "model", "profiler", "planner", "trainer")
# What the planner may use of the packages to its left, so that planning never imports torch.
PLANNER_MAY_IMPORT = ("tasks", "profiler.cost_model", "profiler.profiles")
SOLVERS = {"pyscipopt", "ortools", "highspy", "scipy"}
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "tensorboard")


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import in a file, `from a import b` as `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write it out"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "package.module:function", the way rank functions are named
            module, colon, function = node.value.partition(":")
            parts = module.split(".")
            if colon and function.isidentifier() and len(parts) > 1 and parts[0] in CHAIN:
                yield node.lineno, module


def files_of(package: str, root: Path) -> list[Path]:
    files = sorted((root / package).rglob("*.py"))
    assert files, f"package {package} has no files"
    return files


@pytest.mark.parametrize("package", CHAIN)
def test_a_package_imports_only_those_to_its_left(package: str, project_root: Path) -> None:
    allowed = CHAIN[: CHAIN.index(package) + 1]
    wrong = [
        f"{path.relative_to(project_root)}:{line}: {package} imports {module}"
        for path in files_of(package, project_root)
        for line, module in imported_modules(path)
        if module.split(".")[0] in CHAIN and module.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_the_planner_uses_only_the_light_part_of_the_profiler(project_root: Path) -> None:
    wrong = [
        f"{path.relative_to(project_root)}:{line}: {module}"
        for path in files_of("planner", project_root)
        for line, module in imported_modules(path)
        if module.split(".")[0] in CHAIN[:3]
        and not any(f"{module}.".startswith(f"{may}.") for may in PLANNER_MAY_IMPORT)
    ]
    assert wrong == []


def test_the_model_needs_neither_deepspeed_nor_solvers(project_root: Path) -> None:
    wrong = [
        f"{path.relative_to(project_root)}:{line}: {module}"
        for path in files_of("model", project_root)
        for line, module in imported_modules(path)
        if module.split(".")[0] in {"deepspeed", *SOLVERS}
    ]
    assert wrong == []


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_importing_the_planner_imports_nothing_heavy(project_root: Path) -> None:
    modules = [module_name(path, project_root) for path in files_of("planner", project_root)]
    modules += ["trainer.cli", "model.shapes", "model.topology", "tasks.config"]
    program = (
        f"import importlib, sys\nfor name in {modules!r}:\n    importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_check_sees_imports_inside_functions(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "def f():\n    from trainer.step import run\n    return 'planner.cli:main', 'a: b'\n"
    )
    assert list(imported_modules(source)) == [(2, "trainer.step.run"), (3, "planner.cli")]
