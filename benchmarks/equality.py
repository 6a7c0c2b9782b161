"""How far are our adapters, trained jointly, from PEFT's, trained alone?

    python benchmarks/equality.py [--precision fp64] [--families llama,gemma] [--plans all]

Trains the tasks of tests/trainer/test_equality.py alone with PEFT and jointly with us, and prints,
family by family and plan by plan, the largest relative (Frobenius) difference from PEFT in fp64
over each task's tensors. In fp32 and bf16 a first row says how far PEFT's own run in that precision
is from fp64: what rounding alone does to an Adam update.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lobra.model.precision import DTYPES  # noqa: E402
from tests.model.support import FAMILIES, save_family  # noqa: E402
from tests.trainer.alone import TASKS, make_starts  # noqa: E402
from tests.trainer.test_equality import (  # noqa: E402
    EVERY_FAMILY,
    PLANS,
    Reference,
    final_tensors,
    relative_errors,
    train_jointly,
)

Tensors = dict[str, torch.Tensor]


def row(ours: list[Tensors], exact: list[dict]) -> str:
    """Return each task's largest relative difference over its tensors."""
    worst = [
        max(relative_errors(mine, other["tensors"]).values())
        for mine, other in zip(ours, exact, strict=True)
    ]
    return " | ".join(f"{value:.1e}" for value in worst)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp64")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--plans", choices=("tested", "all"), default="tested")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    names = " | ".join(str(task["name"]) for task in TASKS)
    print(f"| {args.precision}, from PEFT in fp64 | {names} |\n|---|{'---|' * len(TASKS)}")
    for family in args.families.split(","):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            base = save_family(family, folder / "base")
            reference = Reference(base, make_starts(base, folder / "starts"))
            exact = reference.alone(torch.float64)
            if args.precision != "fp64":
                alone = [run["tensors"] for run in reference.alone(DTYPES[args.precision])]
                print(f"| {family}, PEFT alone | {row(alone, exact)} |", flush=True)
            all_plans = args.plans == "all" or family == "llama"
            for number, plan in enumerate(PLANS if all_plans else EVERY_FAMILY):
                run, _ = train_jointly(
                    reference, PLANS[plan], folder / f"run{number}", args.precision
                )
                ours = [final_tensors(run, task) for task in range(len(TASKS))]
                print(f"| {family}, {plan.removeprefix('one ')} | {row(ours, exact)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
