"""How far apart are our adapters, PEFT's in fp32 and PEFT's in fp64?

    python benchmarks/equality_noise.py [--family llama] [--learning-rate 2e-3]

Trains the tasks of tests/trainer/test_equality.py alone with PEFT in fp32 and in fp64, and jointly
with us on three plans, and prints the largest relative (Frobenius) difference over each task's
tensors. It shows what rounding alone does to an Adam update, and so what a bar can ask for.
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
from safetensors.torch import load_file  # noqa: E402

from tests.model.support import FAMILIES, save_family  # noqa: E402
from tests.trainer import test_equality as equality  # noqa: E402
from tests.trainer.support import make_plan, make_run, random_dataset  # noqa: E402
from trainer.run import run_local  # noqa: E402

PLANS = ([(1, 1)], [(1, 1), (1, 1), (2, 1), (1, 2)], [(4, 1), (1, 1)])
Tensors = dict[str, torch.Tensor]


def largest_differences(ours: list[Tensors], theirs: list[Tensors]) -> str:
    """Return each task's largest relative difference over its tensors."""
    worst = []
    for mine, other in zip(ours, theirs, strict=True):
        worst.append(
            max(
                float((mine[name].double() - value.double()).norm() / value.double().norm())
                for name, value in other.items()
            )
        )
    return "  ".join(f"{value:.1e}" for value in worst)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="llama")
    parser.add_argument("--learning-rate", type=float, help="of the task with all linears")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if args.learning_rate:
        equality.TASKS[1]["learning_rate"] = args.learning_rate
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = save_family(args.family, folder / "base")
        datasets = [
            random_dataset(20, shortest, longest, equality.VOCAB, seed)
            for seed, (shortest, longest) in enumerate(equality.LENGTHS)
        ]
        starts = equality.make_starts(base, folder / "starts")
        alone = {
            dtype: [run["tensors"] for run in equality.train_alone(base, datasets, starts, dtype)]
            for dtype in (torch.float32, torch.float64)
        }
        names = [str(task["name"]) for task in equality.TASKS]
        print(f"{args.family}, tasks {', '.join(names)}")
        single, double = alone[torch.float32], alone[torch.float64]
        print(f"{'PEFT fp32 against PEFT fp64':54}{largest_differences(single, double)}")
        for number, layouts in enumerate(PLANS):
            plan = make_plan(layouts, 128)
            tasks = equality.tasks_from(starts)
            run = make_run(folder / f"run{number}", base, tasks, datasets, plan, equality.STEPS)
            run_local(run)
            ours = [
                load_file(run.adapter_folder(task) / "adapter_model.safetensors")
                for task in range(len(tasks))
            ]
            print(f"{f'{plan} against PEFT fp32':54}{largest_differences(ours, single)}")
            print(f"{f'{plan} against PEFT fp64':54}{largest_differences(ours, double)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
