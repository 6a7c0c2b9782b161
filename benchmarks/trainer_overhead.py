"""How much of a step is not computing: preparing, waiting, adapter reduction, optimiser.

Trains random data on the tiny model's shape with CPU ranks, over numbers of tasks (on 4 ranks) and
of ranks (with 8 tasks). Work per task is fixed, so more tasks mean longer steps. Times are means
over ranks' steps without the first two.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import read_shape
from lobra.model.folder import resolve_folder
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.metrics import read_metrics
from lobra.trainer.run import run_local
from tests.trainer.support import dataset_of, make_run

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


def measure(folder: Path, num_tasks: int, num_ranks: int, steps: int) -> dict[str, Any]:
    """Train one case and return its row: shares of step time, times in ms."""
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
    return dataset_of(lengths, vocab_size, generator)


def trainer_overhead(*, steps: int = 12, case: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Train the cases and say what of a step is not computing, as shares of its time.

    Parameters
    ----------
    steps
        To train of each case.
    case
        TASKS,RANKS instead of the usual ones.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for num_tasks, num_ranks in [map(int, one.split(",")) for one in case] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            yield measure(Path(folder) / "run", num_tasks, num_ranks, steps)
