"""Write docs/reproduction.md from the experiments' CSVs.

    lobra experiment page [--collect exp_result] [--results FOLDER] [--page FILE]

``--collect`` first copies the tables of ``exp_result/expr_*``, and the pictures that `lobra report`
made of them, into the results folder.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from experiments.cells import code_digest
from experiments.page import write_page
from experiments.page_tables import Tables
from experiments.provenance import PROVENANCE, read_provenance
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic

RESULTS = Path("docs/results/2026-11-26-experiments")
PAGE = Path("docs/reproduction.md")
Collected = Annotated[
    Path | None, Parameter(name="--collect", help="Folder of experiments to copy tables from.")
]
LEFT_OUT = ("timeline", "steps")  # long; 7B's steps are kept, the others can be made again
PICTURES = {  # picture of the page -> where `lobra report` writes it
    "gpu_seconds_7b.png": "expr_7b/report/gpu_seconds.png",
    "scale_gpus.png": "expr_70b/report/scale_gpus.png",
    "scale_tasks.png": "expr_70b/report/scale_tasks.png",
}


def read_results(folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return the tables of every experiment of a results folder.

    What an experiment was made from is its table ``provenance``, of one row.

    Raises
    ------
    ConfigError
        If there is none.
    """
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for path in sorted(folder.glob("*/*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found.setdefault(path.parent.name, {})[path.stem] = list(csv.DictReader(file))
    if not found:
        raise ConfigError(f"{folder}: no tables of experiments")
    for name, tables in found.items():
        if about := read_provenance(folder / name):
            about |= about.get("inputs", {}).get("main", {})
            tables["provenance"] = [{key: str(value) for key, value in about.items()}]
    return found


def collect(source: Path, target: Path) -> list[str]:
    """Copy tables, estimates of memory, provenance and pictures of ``source/expr_*``.

    They replace what ``target`` has of the same experiments. Returns the experiments left out,
    with the reason.
    """
    left_out = []
    for folder in sorted(source.glob("expr_*")):
        about = read_provenance(folder)
        if about.get("kind") != "simulation" or not about.get("complete"):
            left_out.append(f"{folder.name}: not a simulation that was finished")
            continue
        for path in (target / folder.name).glob("*.csv"):
            path.unlink()
        paths = [*folder.glob("*.csv"), *folder.glob("profile/max_tokens_*.csv")]
        for path in [*sorted(paths), folder / PROVENANCE]:
            if path.stem not in LEFT_OUT or (path.stem, folder.name) == ("steps", "expr_7b"):
                write_atomic(target / folder.name / path.name, path.read_bytes())
    for name, place in PICTURES.items():
        if (source / place).is_file():
            write_atomic(target / name, (source / place).read_bytes())
    return left_out


def made_with_other_code(tables: Tables) -> list[str]:
    """Return the experiments whose planners, profiles or simulator have changed since."""
    current = code_digest()
    return [
        name
        for name, own in tables.items()
        if "provenance" in own and own["provenance"][0].get("code") != current
    ]


def page(*, collected: Collected = None, results: Path = RESULTS, page: Path = PAGE) -> int:
    """Write docs/reproduction.md from the experiments' CSVs.

    Parameters
    ----------
    results
        Folder of the tables.
    page
        The page to write.

    Raises
    ------
    ConfigError
        If there are no results, or not of all experiments.
    """
    if collected:
        for line in collect(collected, results):
            print(f"left out: {line}", file=sys.stderr)
    tables = read_results(results)
    write_atomic(page, write_page(tables, os.path.relpath(results, page.parent)))
    for name in made_with_other_code(tables):
        print(f"{name}: made with other code than is here now", file=sys.stderr)
    return 0
