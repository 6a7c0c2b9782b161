"""A long run of the tiny model: whether memory, handles, threads and files stay as they are.

Two tasks on two CPU ranks, a checkpoint every 50th of the steps, TensorBoard on. What the ranks
hold is looked at 50 times, between two steps. A run is flat if the last quarter holds no more than
the one before, but for what an allocator does by itself.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.failed import Failed
from benchmarks.trainer_overhead import random_dataset
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.layout.layout import Layout
from lobra.layout.order import StepOrder
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import read_shape
from lobra.model.folder import resolve_folder
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.checkpoint_folder import list_checkpoints
from lobra.trainer.engine import Engine
from lobra.trainer.metrics import read_metrics
from lobra.trainer.rank import RankResult, train_rank
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import CONFIG_FILE, RunSpec
from tests.trainer.support import make_run

NUM_LOOKS = 50
NUM_KEPT = 3
MORE_MEMORY = 0.02  # of a rank's, in a quarter of the run
MORE_HANDLES = 2


def soak(*, steps: int = 5000, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Train, and say what the ranks and the run's folder hold meanwhile.

    Parameters
    ----------
    steps
        To train, at least 100.
    folder
        Where the run is to stay; by default it is removed.

    Raises
    ------
    ConfigError
        If the steps are too few to tell anything.
    Failed
        If something grows.
    """
    if steps < 2 * NUM_LOOKS:
        raise ConfigError(f"--steps {steps}: want at least {2 * NUM_LOOKS}")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        run = _new_run(folder or Path(scratch) / "run", steps)
        write_atomic(run.output_dir / CONFIG_FILE, f"steps: {steps}\n")  # TensorBoard shows it
        run_local(run, "benchmarks.soak:train_and_look")
        rows = _rows(run)
        yield from rows
        if grown := _grown(rows, run):
            raise Failed(f"not flat: {'; '.join(grown)}")


def _new_run(folder: Path, steps: int) -> RunSpec:
    base = resolve_folder("tiny")
    data = [random_dataset(seed, read_shape(base).vocab_size) for seed in range(2)]
    tasks = tuple(
        TaskConfig(f"task{n}", 8, 8, TARGET_MODULES, 2, "random", 256, seed=n) for n in range(2)
    )
    plan = Plan((ReplicaGroup(Layout(1, 1), 2, 1024),))
    return make_run(
        folder, base, tasks, data, plan, steps,
        save_every=steps // NUM_LOOKS, keep_checkpoints=NUM_KEPT, report_to=("tensorboard",),
    )  # fmt: skip


def train_and_look(run: RunSpec) -> RankResult:
    """Train as a rank, and write down what its process holds before every 50th of the steps."""
    carry_out = Engine.carry_out
    path = _looks(run, dist.get_rank())

    def looked_at(self: Engine, order: StepOrder, *state: Any) -> Any:
        if order.updates and order.step % (run.last_step // NUM_LOOKS) == 0:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": order.step, **_held(run)}) + "\n")
        return carry_out(self, order, *state)

    Engine.carry_out = looked_at  # type: ignore[method-assign, assignment]
    return train_rank(run)


def _looks(run: RunSpec, rank: int) -> Path:
    return run.output_dir / f"looks_rank_{rank}.jsonl"


def _held(run: RunSpec) -> dict[str, int]:
    """Return what this process and the run's folder hold."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    files = [path for path in run.output_dir.rglob("*") if path.is_file()]
    events = [path for path in files if path.parent.name == "tensorboard"]
    return {
        "memory_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "checkpoints": len(list_checkpoints(run.output_dir)),
        "files": len(files),
        "tensorboard_bytes": sum(path.stat().st_size for path in events),
    }


def _rows(run: RunSpec) -> list[dict[str, Any]]:
    """Return a row a look: the most of all ranks, and the steps' median time since the last."""
    ranks = [
        [json.loads(line) for line in _looks(run, rank).read_text(encoding="utf-8").splitlines()]
        for rank in range(run.world_size)
    ]
    times_ms = [1e3 * line["step_time_s"] for line in read_metrics(run.output_dir)]
    every = run.last_step // NUM_LOOKS
    rows = []
    for looks in zip(*ranks, strict=True):
        most = {name: max(look[name] for look in looks) for name in looks[0]}
        step = most["step"]
        rows.append({**most, "step_ms": median(times_ms[step : step + every])})
    return rows


def _grown(rows: list[dict[str, Any]], run: RunSpec) -> list[str]:
    """Return what has grown in the last quarter of a run, and files that are not as promised."""
    quarter = len(rows) // 4
    before, last = rows[-2 * quarter : -quarter], rows[-quarter:]
    limits = {"memory_bytes": 1 + MORE_MEMORY, "handles": 1.0, "threads": 1.0, "files": 1.0}
    found = []
    for name, factor in limits.items():
        then, now = (median(row[name] for row in part) for part in (before, last))
        more = MORE_HANDLES if name in ("handles", "files") else 0
        if now > then * factor + more:
            found.append(f"{name} from {then:,.0f} to {now:,.0f}")
    if (kept := len(list_checkpoints(run.output_dir))) != NUM_KEPT:
        found.append(f"{kept} checkpoints instead of {NUM_KEPT}")
    lines = read_metrics(run.output_dir)
    if len(lines) != run.last_step:
        found.append(f"{len(lines)} logged steps instead of {run.last_step}")
    return found
