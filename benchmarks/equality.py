"""How far are our adapters, trained jointly, from PEFT's, trained alone?

Trains the tasks of tests/trainer/test_equality.py alone with PEFT (on the CPU) and jointly with us.
A row holds, for a precision, a family and a plan, the largest relative (Frobenius) difference from
PEFT in fp64 over each task's tensors. In fp32 and bf16 a first row says how far PEFT's own run in
that precision is from fp64: what rounding alone does to an Adam update.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from benchmarks.failed import Failed
from lobra.common.errors import ConfigError
from lobra.model.precision import DTYPES
from lobra.profiler.hardware import resolve_device
from tests.model.support import FAMILIES, save_family
from tests.trainer.alone import TASKS, make_starts
from tests.trainer.test_equality import (
    BAR,
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
    precision: tuple[Literal["fp32", "bf16", "fp64"], ...] = ("fp64",),
    families: tuple[str, ...] = tuple(FAMILIES),
    plans: str = "tested",
    device: Literal["auto", "cpu", "cuda"] = "cpu",
) -> Iterator[dict[str, str]]:
    """Compare adapters trained jointly by us with PEFT's, trained alone in fp64.

    Parameters
    ----------
    precision
        Of our runs.
    families
        Families of models.
    plans
        Those that the tests run of a family (tested), all, or some of the tests' by name, such as
        "one <1,1>;<1,1> <2,2>".
    device
        What our ranks run on.

    Raises
    ------
    ConfigError
        If a family or a plan is unknown.
    Failed
        If a run in fp64 is further away than the tests allow.
    """
    named = [] if plans in ("tested", "all") else plans.split(";")
    problems = [
        f"{option}: {value!r} is not one of {', '.join(known)}"
        for option, values, known in (("families", families, FAMILIES), ("plans", named, PLANS))
        for value in values
        if value not in known
    ]
    if problems:
        raise ConfigError(problems)
    device = resolve_device(device)
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    too_far = []
    for family in families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = save_family(family, folder / "base")
            reference = Reference(base, make_starts(base, folder / "starts"))
            exact = [run["tensors"] for run in reference.alone(torch.float64)]
            for kind in precision:
                about = {"precision": kind, "family": family}
                if kind != "fp64":
                    alone = [run["tensors"] for run in reference.alone(DTYPES[kind])]
                    yield {**about, "run": "PEFT alone"} | _shown(_distances(alone, exact))
                every_plan = plans == "all" or family == "llama"
                for plan in named or (PLANS if every_plan else EVERY_FAMILY):
                    place = folder / f"{kind}-{plan}"
                    run, _ = train_jointly(reference, PLANS[plan], place, kind, device)
                    ours = [final_tensors(run, task) for task in range(len(TASKS))]
                    distances = _distances(ours, exact)
                    yield {**about, "run": plan.removeprefix("one ")} | _shown(distances)
                    if kind == "fp64" and max(distances.values()) >= BAR:
                        too_far.append(f"{family} on {plan}")
    if too_far:
        raise Failed(f"further from PEFT than {BAR:g} in fp64: {', '.join(too_far)}")


def _distances(ours: Sequence[Tensors], exact: Sequence[Tensors]) -> dict[str, float]:
    """Return each task's largest relative difference over its tensors."""
    return {
        str(task["name"]): max(relative_errors(mine, other).values())
        for task, mine, other in zip(TASKS, ours, exact, strict=True)
    }


def _shown(distances: dict[str, float]) -> dict[str, str]:
    return {name: f"{distance:.1e}" for name, distance in distances.items()}
