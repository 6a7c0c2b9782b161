"""How much of a step is not computing: preparing, waiting, adapter reduction, optimiser.

    python benchmarks/trainer_overhead.py [--steps 12] [--output FILE.csv] [--case 32,4 ...]

Trains random data on the tiny model's shape with CPU ranks, over numbers of tasks (on 4 ranks) and
of ranks (with 8 tasks), and prints a table. Work per task is fixed, so more tasks mean longer
steps. Times are means over ranks' steps without the first two.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from lobra.layout.layout import Layout  # noqa: E402
from lobra.layout.plan import Plan, ReplicaGroup  # noqa: E402
from lobra.layout.shapes import read_shape  # noqa: E402
from lobra.model.folder import resolve_folder  # noqa: E402
from lobra.tasks.config import TARGET_MODULES, TaskConfig  # noqa: E402
from lobra.tasks.dataset import TokenizedDataset  # noqa: E402
from lobra.trainer.metrics import read_metrics  # noqa: E402
from lobra.trainer.run import run_local  # noqa: E402
from tests.trainer.support import make_run  # noqa: E402

SEQUENCES_PER_TASK = 6
LENGTHS = (24, 200)
PLANS = {
    1: [(1, 1)],
    2: [(1, 1), (1, 1)],
    4: [(1, 1), (1, 1), (2, 1)],
    8: [(1, 1), (1, 1), (1, 1), (1, 1), (2, 1), (1, 2)],
}
CASES = [(tasks, 4) for tasks in (1, 2, 4, 8, 16, 32)] + [(8, ranks) for ranks in (1, 2, 8)]
PARTS = {
    "dispatch_wait": "dispatch_wait_s",
    "prepare": "prepare_time_s",
    "replica_wait": "replica_wait_s",
    "reduction": "reduce_time_s",
    "optimiser": "optimizer_time_s",
}
COLUMNS = ("tasks", "ranks", "step_ms", *PARTS, "solve_ms")


def measure(folder: Path, num_tasks: int, num_ranks: int, steps: int) -> dict[str, float]:
    """Train one case and return rank 0's row of COLUMNS: shares of step time, times in ms."""
    base = resolve_folder("tiny")
    shape = read_shape(base)
    tasks = tuple(
        TaskConfig(f"task{n}", 16, 16, TARGET_MODULES, SEQUENCES_PER_TASK, "random", 256, seed=n)
        for n in range(num_tasks)
    )
    groups = tuple(ReplicaGroup(Layout(tp, pp), 1, 1024) for tp, pp in PLANS[num_ranks])
    data = [random_dataset(number, shape.vocab_size) for number in range(num_tasks)]
    run_local(make_run(folder, base, tasks, data, Plan(groups), steps, num_buckets=16))
    timed = read_metrics(folder)[2:]
    total_s = sum(step["step_time_s"] for step in timed)
    shares = {part: sum(step[field] for step in timed) / total_s for part, field in PARTS.items()}
    return {
        "tasks": num_tasks,
        "ranks": num_ranks,
        "step_ms": 1e3 * total_s / len(timed),
        **shares,
        "solve_ms": 1e3 * sum(step["dispatch_time_s"] for step in timed) / len(timed),
    }


def random_dataset(seed: int, vocab_size: int) -> TokenizedDataset:
    """Return 200 random sequences of heavy-tailed lengths, all tokens targets but the first."""
    generator = np.random.default_rng(seed)
    low, high = LENGTHS
    lengths = np.clip(generator.lognormal(4.0, 0.6, 200), low, high).astype(np.int64)
    tokens = generator.integers(3, vocab_size, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = tokens.copy()
    labels[offsets[:-1]] = -100
    return TokenizedDataset(tokens, labels, offsets)


def main() -> int:
    """Run all cases and print (and write) the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", nargs="*", help="TASKS,RANKS instead of the usual ones")
    args = parser.parse_args()
    rows = []
    print("".join(f"{column:>15}" for column in COLUMNS))
    cases = [tuple(map(int, case.split(","))) for case in args.case or ()] or CASES
    for num_tasks, num_ranks in cases:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder) / "run", num_tasks, num_ranks, args.steps)
        rows.append([row[column] for column in COLUMNS])
        print("".join(f"{value:>15.4g}" for value in rows[-1]), flush=True)
    if args.output:
        with args.output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
