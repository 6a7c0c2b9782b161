"""What benchmarks/gpu.sh needs that this Python lacks, and which of its parts must be left out.

    python benchmarks/gpu_packages.py

Says so in one message and prints the parts' names. Needs nothing but Python.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.py"

# Importable names of what the parts import themselves.
MODEL = (
    *("numpy", "scipy", "torch", "transformers", "safetensors", "yaml"),
    *("cyclopts", "pydantic", "rich"),
)
TRAINER = (*MODEL, "deepspeed", "ortools")
TESTS = (*TRAINER, "tokenizers", "peft", "pytest")
NEEDED = {
    "tests": (*TESTS, "hypothesis"),
    "equality": TESTS,
    "multi_lora": (*TRAINER, "peft"),
    "activations": TRAINER,
    "attention": MODEL,
    "linears": MODEL,
    "training": (*TRAINER, "tokenizers"),
    "ranks": TESTS,
}
PACKAGES = {"yaml": "pyyaml"}  # by importable name, where they differ


def is_there(module: str) -> bool:
    """Return whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def lacking(is_there: Callable[[str], bool]) -> dict[str, list[str]]:
    """Return what each part lacks, of the parts that lack something."""
    found = {
        part: [module for module in needed if not is_there(module)]
        for part, needed in NEEDED.items()
    }
    return {part: modules for part, modules in found.items() if modules}


def requirements(modules: Iterable[str]) -> list[str]:
    """Return packages as pip takes them, in the versions that setup.py asks for."""
    versions = dict(re.findall(r'"([\w-]+)([<>=][^"]*)"', SETUP.read_text(encoding="utf-8")))
    names = [PACKAGES.get(module, module) for module in modules]
    return [name + versions.get(name, "") for name in names]


def message(parts: dict[str, list[str]]) -> str:
    """Return what to tell about parts that lack something."""
    modules = dict.fromkeys(module for lacked in parts.values() for module in lacked)
    return (
        f"This Python, {platform.python_version()}, lacks {', '.join(requirements(modules))}.\n"
        f"Left out for that: {', '.join(parts)}.\n"
        f"Where there is a network and the same Python: pip install --target FOLDER ..., and\n"
        f"delete torch, triton and nvidia from FOLDER, or they hide the GPU machine's own.\n"
        f"There, run again with PYTHONPATH=FOLDER."
    )


if __name__ == "__main__":
    if parts := lacking(is_there):
        print(message(parts), file=sys.stderr)
        print(*parts)
