"""The packages form a chain: each imports only those to its left, wherever the import stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHAIN = (
    "common", "tasks", "layout", "model", "profiler", "planner", "trainer", "report", "service",
)  # fmt: skip
# What the planner may use of model and profiler, so that planning never imports torch.
LIGHT = ("model.folder", "profiler.cost_model", "profiler.profiles")
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
            # "lobra.package.module:function", the way rank functions are named
            module, colon, function = node.value.partition(":")
            if colon and function.isidentifier() and module.startswith("lobra."):
                yield node.lineno, module


def own_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, package.module) of what a file imports of the project."""
    for line, module in imported_modules(path):
        first, _, rest = module.partition(".")
        if first == "lobra":
            yield line, rest
        assert first not in CHAIN, f"{path}:{line}: {module}: is called lobra.{module}"


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
        for line, module in own_modules(path)
        if module.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_what_is_installed_is_the_chain_its_commands_and_task_sets(project_root: Path) -> None:
    folder = project_root / "lobra"
    links = {path.name: path.resolve() for path in folder.iterdir() if path.is_symlink()}
    assert links == {name: project_root / name for name in (*CHAIN, "trainer_config")}
    own = {path.name for path in folder.iterdir() if not path.is_symlink()} - {"__pycache__"}
    assert own == {"__init__.py", "__main__.py", "cli.py", "commands", "py.typed"}


def test_the_planner_uses_only_the_light_part_of_model_and_profiler(project_root: Path) -> None:
    wrong = [
        f"{path.relative_to(project_root)}:{line}: {module}"
        for path in files_of("planner", project_root)
        for line, module in own_modules(path)
        if module.split(".")[0] in ("model", "profiler")
        and not any(f"{module}.".startswith(f"{may}.") for may in LIGHT)
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
    return ".".join(("lobra", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def test_importing_layouts_and_the_planner_imports_nothing_heavy(project_root: Path) -> None:
    light = [*files_of("layout", project_root), *files_of("planner", project_root)]
    modules = [module_name(path, project_root) for path in light]
    modules += ["lobra.cli", "lobra.commands.plan", "lobra.tasks.task_file"]
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
        "def f():\n    from lobra.trainer.step import run\n    return 'lobra.a:main', 'a: b'\n"
    )
    assert list(own_modules(source)) == [(2, "trainer.step.run"), (3, "a")]
