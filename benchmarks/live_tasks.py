"""A run whose tasks come and go, planned anew: what a switch takes, and that adapters are as alone.

A small Llama in fp64 on four CPU ranks. Three tasks join, two are cancelled, the others end by
themselves. Tasks of short sequences are best on four replicas, one long sequence a step on shards.
Every adapter is compared with PEFT's, trained alone for the steps that its task was in.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.failed import Failed
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.profiler.profiles import MemoryProfile, MemoryRow
from lobra.trainer.ledger import check_ledger
from lobra.trainer.metrics import read_metrics
from lobra.trainer.replanner import read_replans
from lobra.trainer.restarts import run_with_restarts
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import CONFIG_FILE, Admission, Replanning
from lobra.trainer.task_file_watch import request_to_join
from lobra.trainer.task_requests import TaskRequest
from tests.model.support import save_llama
from tests.trainer.alone import VOCAB, make_starts, tasks_from, train_alone
from tests.trainer.live import sharding_costs, write_rows, write_script
from tests.trainer.support import make_plan, make_run, random_dataset

SHORT, LONG = (40, 120), (900, 1000)  # tokens
#: Of each task its lengths, batch, steps of 300, the step after which it joins and that after which
#: it is cancelled.
TASKS: dict[str, tuple[tuple[int, int], int, int, int | None, int | None]] = {
    "throughout": (SHORT, 24, 300, None, None),
    "cancelled": (SHORT, 24, 300, None, 120),
    "long": (LONG, 1, 100, 40, None),
    "brief": (SHORT, 8, 60, 90, None),
    "long_cancelled": (LONG, 1, 300, 180, 250),
}
MOST_ERROR = 1e-8  # relative, of a tensor, after hundreds of steps in fp64
PLAN = make_plan([(1, 1)] * 4, 1024)
MEMORY = MemoryProfile(
    tuple(MemoryRow(tp, pp, 1, 1024 * tp * pp) for tp, pp in ((1, 1), (2, 1), (4, 1), (1, 2)))
)


def live_tasks(*, steps: int = 300, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Train, then compare: a row for every decision about the plan and for every task.

    Parameters
    ----------
    steps
        Of the run; all of the schedule is scaled to it.
    folder
        Where the run is to stay; by default it is removed.

    Raises
    ------
    ConfigError
        If the steps are too few for the schedule.
    Failed
        If an adapter is another than alone, or the ledger has a gap.
    """
    if steps < 30:
        raise ConfigError(f"--steps {steps}: want at least 30")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        yield from _measured(folder or Path(scratch), steps / 300)


def _measured(folder: Path, scale: float) -> Iterator[dict[str, Any]]:
    base = save_llama(folder / "base", vocab_size=VOCAB, max_position_embeddings=1024)
    made = {name: round(scale * task[2]) for name, task in TASKS.items()}
    joins = {name: round(scale * (task[3] or 0)) for name, task in TASKS.items()}
    leaves = {name: round(scale * task[4]) for name, task in TASKS.items() if task[4]}
    entries = [
        dict(
            name=name, rank=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "down_proj"),
            global_batch_size=batch, learning_rate=1e-3, max_grad_norm=1.0, steps=made[name],
        )
        for name, (_, batch, *_) in TASKS.items()
    ]  # fmt: skip
    data = [random_dataset(20, *own[0], VOCAB, seed) for seed, own in enumerate(TASKS.values())]
    starts = make_starts(base, folder / "starts", entries)
    configs = [
        replace(
            task, dataset_name=write_rows(folder / f"{task.name}.jsonl", own), context_length=1024
        )
        for task, own in zip(tasks_from(starts, entries), data, strict=True)
    ]
    present = [number for number, name in enumerate(TASKS) if not joins[name]]
    run = make_run(
        folder / "run", base, tuple(configs[n] for n in present), [data[n] for n in present],
        PLAN, round(300 * scale), precision="fp64", admission=Admission(PLAN, folder, MEMORY),
        replanning=Replanning("small", 4, 4), save_every=0, cost_model=sharding_costs(4),
    )  # fmt: skip
    requests: dict[int, list[TaskRequest]] = {}
    for task in configs:
        if joins[task.name]:
            requests.setdefault(joins[task.name], []).append(request_to_join(task))
    for name, step in leaves.items():
        requests.setdefault(step, []).append(TaskRequest(name))
    write_script(run, requests)
    noted = {"seed": run.seed, "tasks": [], "digests": {"data": {}}}
    write_atomic(run.output_dir / CONFIG_FILE, yaml.safe_dump(noted))
    start = time.perf_counter()
    run_with_restarts(run, 0, partial(run_local, target="tests.trainer.live:train_as_scripted"))
    yield {"steps": len(read_metrics(run.output_dir)), "seconds": time.perf_counter() - start}
    for decided in read_replans(run.output_dir):
        yield {
            "step": decided.step,
            "switched": decided.switched,
            "from": decided.present,
            "to": decided.proposed,
            "gain_s": decided.gain_s,
            "cost_s": decided.cost_s,
            "pause_s": decided.pause_s,
        }
    steps_of = {name: min(made[name], leaves.get(name, 10**9) - joins[name]) for name in TASKS}
    yield from _compared(base, run.output_dir, data, starts, entries, steps_of)


def _compared(
    base: Path, run: Path, data: list[Any], starts: list[Path], entries: list[dict[str, Any]],
    steps: dict[str, int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield how far each adapter is from PEFT's, trained alone for as many steps."""
    import torch
    from safetensors.torch import load_file

    lines = read_metrics(run)
    problems = list(check_ledger(run).problems)
    for number, entry in enumerate(entries):
        name = entry["name"]
        alone = [{**each, "steps": steps[each["name"]]} for each in entries]
        (peft,) = train_alone(base, data, starts, torch.float64, tasks=alone, numbers=[number])
        found = load_file(run / "adapters" / name / "adapter_model.safetensors")
        error = max(
            float((found[key] - expected).norm() / expected.norm())
            for key, expected in peft["tensors"].items()
        )
        trained = sum(name in line["tasks"] for line in lines)
        yield {"task": name, "steps": trained, "of": steps[name], "error": error}
        if trained != steps[name] or error > MOST_ERROR:
            problems.append(f"task {name}: {trained} steps, {error:.1e} from alone")
    if problems:
        raise Failed("; ".join(problems))
