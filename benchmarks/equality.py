"""How far are our adapters, trained jointly, from PEFT's, trained alone?

Trains the tasks of tests/trainer/test_equality.py alone with PEFT and jointly with us. A row holds,
for a family and a plan, the largest relative (Frobenius) difference from PEFT in fp64
over each task's tensors. In fp32 and bf16 a first row says how far PEFT's own run in that precision
is from fp64: what rounding alone does to an Adam update.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from lobra.model.precision import DTYPES
from tests.model.support import FAMILIES, save_family
from tests.trainer.alone import TASKS, make_starts
from tests.trainer.test_equality import (
    EVERY_FAMILY,
    PLANS,
    Reference,
    final_tensors,
    relative_errors,
    train_jointly,
)

Tensors = dict[str, torch.Tensor]


def equality(
    *,
    precision: Literal["fp32", "bf16", "fp64"] = "fp64",
    families: tuple[str, ...] = tuple(FAMILIES),
    plans: Literal["tested", "all"] = "tested",
) -> Iterator[dict[str, str]]:
    """Compare adapters trained jointly by us with PEFT's, trained alone in fp64.

    Parameters
    ----------
    precision
        Of our runs.
    families
        Families of models.
    plans
        Those that the tests run of a family, or all.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)

    def row(family: str, run: str, ours: list[Tensors], exact: list[dict]) -> dict[str, str]:
        worst = {
            str(task["name"]): max(relative_errors(mine, other["tensors"]).values())
            for task, mine, other in zip(TASKS, ours, exact, strict=True)
        }
        return {"family": family, "run": run} | {name: f"{w:.1e}" for name, w in worst.items()}

    for family in families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = save_family(family, folder / "base")
            reference = Reference(base, make_starts(base, folder / "starts"))
            exact = reference.alone(torch.float64)
            if precision != "fp64":
                alone = [run["tensors"] for run in reference.alone(DTYPES[precision])]
                yield row(family, f"PEFT alone, {precision}", alone, exact)
            every_plan = plans == "all" or family == "llama"
            for number, plan in enumerate(PLANS if every_plan else EVERY_FAMILY):
                run, _ = train_jointly(reference, PLANS[plan], folder / f"run{number}", precision)
                ours = [final_tensors(run, task) for task in range(len(TASKS))]
                yield row(family, plan.removeprefix("one "), ours, exact)
