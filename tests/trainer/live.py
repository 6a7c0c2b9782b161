"""Runs whose tasks come and go at given steps, and what else is done to them then."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from lobra.layout.order import SlotOrder
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.profiles import TimeProfile
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer import coordinator, replanner
from lobra.trainer import rank as one_rank
from lobra.trainer.coordinator import Coordinator
from lobra.trainer.engine import Engine
from lobra.trainer.forecast import Forecast
from lobra.trainer.proposal import Proposal
from lobra.trainer.records import Records
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.task_changes import DueChange, TaskChanges
from lobra.trainer.task_requests import FOLDER, TaskRequest, send

SCRIPT_FILE = "script.json"  # in a run's folder


def write_script(
    run: RunSpec,
    requests: dict[int, list[TaskRequest]],
    killed_at: int | None = None,
    cost_s: float = 0.0,
) -> None:
    """Have a run be asked for changes after so many steps, and killed once after others.

    ``cost_s`` is what switching to another plan is thought to cost before it was done.
    """
    run.output_dir.mkdir(parents=True, exist_ok=True)
    asked = {step: [asdict(one) for one in several] for step, several in requests.items()}
    script = {"requests": asked, "killed_at": killed_at, "cost_s": cost_s}
    (run.output_dir / SCRIPT_FILE).write_text(json.dumps(script))


def train_as_scripted(run: RunSpec) -> one_rank.RankResult:
    """Train; what is asked is waited for, and the slots of others than it is about never move."""
    file = run.output_dir / SCRIPT_FILE
    script = json.loads(file.read_text())
    requests = {
        int(step): [TaskRequest(**one) for one in several]
        for step, several in script["requests"].items()
    }

    class Scripted(Coordinator):
        def _change_tasks(self, records: Records) -> None:
            if self.live.step == script["killed_at"]:
                file.write_text(json.dumps({**script, "killed_at": None}))
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            if not _was_asked(run, self.live.step):
                for request in requests.get(self.live.step, ()):
                    send(run.output_dir, request)
            super()._change_tasks(records)

    class Watched(Engine):
        def change_slot(self, order: SlotOrder) -> None:
            others = {n: slot for n, slot in self.stage.slots.items() if n != order.task}
            before = {n: slot.weights.clone() for n, slot in others.items()}
            moments = {n: self.optimizer.moments(n) for n in others}
            super().change_slot(order)
            for number in others:
                assert self.stage.slots[number].weights.equal(before[number])
                for kind, flats in self.optimizer.moments(number).items():
                    for layers, flat in flats.items():
                        assert flat.equal(moments[number][kind][layers])

    class Patient(TaskChanges):
        def due(self, step: int, waits: bool) -> Iterator[DueChange]:
            return super().due(step, waits=True)

    one_rank.Engine, one_rank.Coordinator = Watched, Scripted  # type: ignore[misc]
    coordinator.TaskChanges = Patient  # type: ignore[misc]
    result = one_rank.train_rank(run)
    assert dist.get_world_size() == run.world_size
    return result


def _was_asked(run: RunSpec, step: int) -> bool:
    """Return whether the requests of a step were sent: by an attempt that was killed later."""
    marker = run.output_dir / FOLDER / f"asked_{step}"
    if marker.exists():
        return True
    marker.parent.mkdir(exist_ok=True)
    marker.touch()
    return False


def sharding_costs(num_layers: int) -> CostModel:
    """Return costs by which shards do not pay for many short sequences, but for a long one."""
    rows = [(tp, s, b) for tp in (1, 2, 4) for s in (16, 64, 128, 256, 512) for b in (1, 2, 4, 8)]
    tp, s, b = (np.asarray(column, dtype=np.int64) for column in zip(*rows, strict=True))
    time_ms = 0.2 + (b * s / 200 + b * s * s / 1e5) / tp**0.6
    return fit_cost_model(TimeProfile(tp, s, b, time_ms), num_layers)


def write_rows(path: Path, data: TokenizedDataset) -> str:
    """Write a data set as rows of tokens; return its path, as a task names it."""
    rows = (
        {"input_ids": t.tolist(), "labels": y.tolist()}
        for t, y in map(data.sequence, range(len(data)))
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train_and_replan(run: RunSpec) -> one_rank.RankResult:
    """Train as scripted; a proposal is waited for, and steps seem to take long, as large ones do.

    What a switch costs is as the script says, until one was made.
    """
    cost_s = json.loads((run.output_dir / SCRIPT_FILE).read_text())["cost_s"]
    look = replanner.Replanner.look

    def patient(self: replanner.Replanner, *args: Any) -> Proposal | None:
        found = look(self, *args)
        while found is None and self._process is not None:
            time.sleep(0.05)
            found = look(self, *args)
        return found

    replanner.Replanner.look = patient  # type: ignore[method-assign, assignment]
    replanner.process_age_s = lambda: cost_s
    Forecast.pace = 1e5  # type: ignore[assignment, method-assign]
    return train_as_scripted(run)
