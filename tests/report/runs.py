"""Folders of runs as a coordinator leaves them, of any size, without training."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path

import yaml

from lobra.layout.layout import Layout
from lobra.layout.plan import PlanEntry, ReplicaGroup
from lobra.trainer.metrics import MetricsFile, ReplicaMetrics, StepMetrics, TaskMetrics
from lobra.trainer.run_config import PlanPeriod

Groups = Sequence[tuple[int, int, int]]  # (replicas, tp, pp)
VALIDATE_EVERY = 20


def write_run(
    folder: Path,
    tasks: Sequence[str],
    num_steps: int,
    plans: dict[int, Groups] | None = None,
    resumed: Sequence[int] = (),
    noise: float = 0.25,
) -> Path:
    """Write a run's config.yaml and metrics.jsonl: losses fall, noisily; return the folder.

    Plans are by their first step; a run also went on at the steps `resumed`, on the same plan.
    """
    draw = random.Random(len(tasks) + num_steps)
    plans = plans or {0: [(1, 1, 1)]}
    entries = {
        start: [PlanEntry.of(ReplicaGroup(Layout(tp, pp), dp, 1024)) for dp, tp, pp in groups]
        for start, groups in plans.items()
    }
    periods = [
        PlanPeriod(start, plan, None, "cuda", "bf16").as_plain() for start, plan in entries.items()
    ]
    folder.mkdir(parents=True)
    config = {
        "versions": {"lobra": "0"},
        "tasks": [{"name": name, "num_steps": num_steps} for name in tasks],
        "device": "cuda",
        "plan": periods[-1]["plan"],
        "plans": periods,
        "resumes": list(resumed),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    file = MetricsFile(folder)
    for step in range(num_steps):
        start = max(at for at in plans if at <= step)
        layouts = [Layout(tp, pp) for dp, tp, pp in plans[start] for _ in range(dp)]
        step_time_s = draw.uniform(1.9, 2.2) * (2.0 if step in {0, *resumed} else 1.0)
        losses = [
            1.2 + 0.4 * place + math.exp(-step / 40) + draw.gauss(0, noise)
            for place in range(len(tasks))
        ]
        checked = step % VALIDATE_EVERY == VALIDATE_EVERY - 1
        file.write(
            StepMetrics(
                step=step,
                step_time_s=step_time_s,
                predicted_step_time_s=2.0,
                dispatch_time_s=0.01,
                dispatch_wait_s=0.0,
                prepare_time_s=0.01,
                replica_wait_s=0.1,
                reduce_time_s=0.02,
                optimizer_time_s=0.02,
                tokens=20_000,
                padded_tokens=20_000,
                gpu_seconds=step_time_s * sum(layout.num_gpus for layout in layouts),
                memory_bytes=1 << 30,
                tasks={
                    name: TaskMetrics(
                        loss=loss, tokens=100, sequences=8, grad_norm=1.0, lr=1e-4, applied=True,
                        own_step=step, validation_loss=loss + 0.2 if checked else None,
                    )
                    for name, loss in zip(tasks, losses, strict=True)
                },
                replicas=[
                    ReplicaMetrics(str(layout), draw.uniform(0.8, 0.97) * 1.9, 1.9, 1.0, 4, 2_000)
                    for layout in layouts
                ],
                plan_from=start,
            )
        )  # fmt: skip
    file.close()
    return folder
