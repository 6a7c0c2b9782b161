"""How far a long joint run gets from PEFT's, trained alone, step by step.

The tasks of tests/trainer/test_equality.py, for all the steps, on a plan whose replicas differ.
The reference is PEFT in fp64; beside ours in fp32 stands PEFT's own run in fp32, which says what
rounding alone does in so many steps of Adam.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.failed import Failed
from lobra.common.errors import ConfigError
from lobra.model.precision import DTYPES
from lobra.trainer.run import run_local
from tests.model.support import save_llama
from tests.trainer.alone import TASKS, make_datasets, make_starts, tasks_from, train_alone
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import BAR, final_tensors, joined_error, losses_of

LAYOUTS = [(1, 1), (1, 2)]
NUM_PARTS = 5  # of the run, whose losses are compared


def drift(
    *, steps: int = 500, precision: tuple[Literal["fp64", "fp32"], ...] = ("fp64", "fp32")
) -> Iterator[dict[str, Any]]:
    """Train jointly and alone, and compare losses on the way and adapters at the end.

    A row holds the largest relative differences over the tasks from PEFT in fp64: of the losses of
    each fifth of the steps, and of all A and all B at the end.

    Parameters
    ----------
    steps
        To train, at least 5.
    precision
        Of our runs.

    Raises
    ------
    ConfigError
        If the steps are too few to be divided.
    Failed
        If an adapter of a run in fp64 is further away than the tests allow for their five steps.
    """
    if steps < NUM_PARTS:
        raise ConfigError(f"--steps {steps}: want at least {NUM_PARTS}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    tasks = [{**task, "steps": steps} for task in TASKS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_llama(folder / "base")
        starts = make_starts(base, folder / "starts", tasks)
        exact = train_alone(base, make_datasets(), starts, torch.float64, tasks=tasks)
        for kind in precision:
            if kind != "fp64":
                alone = train_alone(base, make_datasets(), starts, DTYPES[kind], tasks=tasks)
                yield _row("PEFT alone", kind, alone, exact)
            run = make_run(
                folder / kind, base, tasks_from(starts, tasks), make_datasets(),
                make_plan(LAYOUTS, max_tokens=128), steps, precision=kind, save_every=0,
            )  # fmt: skip
            run_local(run)
            ours = [
                {"tensors": final_tensors(run, number), "losses": losses_of(run, task.name)}
                for number, task in enumerate(run.tasks)
            ]
            row = _row("ours jointly", kind, ours, exact)
            yield row
            if kind == "fp64" and max(row["A"], row["B"]) > BAR:
                raise Failed(f"fp64: {max(row['A'], row['B']):.1e} from PEFT, want {BAR:.0e}")


def _row(
    side: str, kind: str, ours: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return how far a side's losses and adapters are from PEFT's in fp64."""
    errors = [
        [abs(a / b - 1) for a, b in zip(own["losses"], other["losses"], strict=True)]
        for own, other in zip(ours, exact, strict=True)
    ]
    steps = len(errors[0])
    bounds = [steps * part // NUM_PARTS for part in range(NUM_PARTS + 1)]
    row: dict[str, Any] = {"side": side, "precision": kind}
    for begin, end in pairwise(bounds):
        row[f"loss, to step {end}"] = max(max(own[begin:end]) for own in errors)
    for part in ("A", "B"):
        row[part] = max(
            joined_error(own["tensors"], other["tensors"], part)
            for own, other in zip(ours, exact, strict=True)
        )
    return row
