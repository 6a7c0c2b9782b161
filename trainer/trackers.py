"""Trackers: where a run's curves are shown while it trains, beside metrics.jsonl.

A tracker may be a service on the network, and must neither end a run nor hold it up: each is given
its steps on a thread of its own. One that fails is warned of, once, and gets no further steps.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import yaml

from lobra.common.errors import Problems
from lobra.trainer.metrics import StepMetrics
from lobra.trainer.run_spec import CONFIG_FILE, RunSpec

log = logging.getLogger(__name__)

#: Of each tracker its package's module, and where its class is.
TRACKERS: Mapping[str, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "lobra.trainer.tensorboard:TensorBoard"),
    "wandb": ("wandb", "lobra.trainer.wandb_tracker:Wandb"),
    "mlflow": ("mlflow", "lobra.trainer.mlflow_tracker:Mlflow"),
}
PATIENCE_S = 60.0  # for a tracker to take what it has not taken yet, when a run ends


class Tracker(Protocol):
    """Somewhere curves are written to; made with (run, config.yaml as it was read, first step)."""

    def write(self, values: dict[str, float], step: int) -> None:
        """Write the curves' values of a step, counted from 0."""

    def close(self, failed: bool) -> None:
        """Write what is still in memory, and whether the run failed."""


class OwnThread:
    """A tracker on a thread of its own; whatever it raises is warned of and ends it alone."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        """Have ``make`` make the tracker when the first step comes."""
        self._name = name
        self._make = make
        self._steps: queue.SimpleQueue[StepMetrics | bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def write(self, metrics: StepMetrics) -> None:
        """Have a step written."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._steps.put(metrics)

    def close(self, failed: bool = False) -> None:
        """Wait until all is written, but not for ever; say whether the run failed."""
        if self._thread is None:
            return
        self._steps.put(failed)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            log.warning("%s: not all could be written within %.0f s", self._name, PATIENCE_S)

    def _work(self) -> None:
        try:
            tracker = self._make()
            while not isinstance(item := self._steps.get(), bool):
                tracker.write(curves(item), item.step)
            tracker.close(failed=item)
        except Exception as error:  # of any library, of any kind: the run goes on
            log.warning(
                "%s: the run goes on without it, since it failed: %s: %s",
                self._name, type(error).__name__, error,
            )  # fmt: skip


def open_tracker(name: str, run: RunSpec, begin: int) -> OwnThread:
    """Return the tracker of this name, for a run's steps from ``begin`` on."""

    def make() -> Tracker:
        module, _, kind = TRACKERS[name][1].partition(":")
        config = yaml.safe_load((run.output_dir / CONFIG_FILE).read_text(encoding="utf-8"))
        tracker: Tracker = getattr(importlib.import_module(module), kind)(
            run.output_dir, config, begin
        )
        return tracker

    return OwnThread(name, make)


def trackers_of(text: str) -> tuple[str, ...]:
    """Return the trackers of a list with commas between their names; of "none" no one.

    Raises
    ------
    ConfigError
        For every name that is none of a tracker's, and for every package that is not installed.
    """
    problems = Problems()
    found: list[str] = []
    names = [] if text.strip() == "none" else [name.strip() for name in text.split(",")]
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            problems.add(f"--report-to {name}: want some of {', '.join(TRACKERS)}, or none")
        elif importlib.util.find_spec(TRACKERS[name][0]) is None:
            problems.add(f"--report-to {name}: it is not installed; pip install 'lobra[{name}]'")
        else:
            found.append(name)
    problems.raise_if_any()
    return tuple(found)


def curves(metrics: StepMetrics) -> dict[str, float]:
    """Return the values of a step's curves by their names."""
    values: dict[str, Any] = {
        "step/time_s": metrics.step_time_s,
        "step/predicted_time_s": metrics.predicted_step_time_s,
        "step/dispatch_wait_s": metrics.dispatch_wait_s,
        "step/prepare_time_s": metrics.prepare_time_s,
        "step/replica_wait_s": metrics.replica_wait_s,
        "step/reduce_time_s": metrics.reduce_time_s,
        "step/tokens_per_second": metrics.tokens_per_s,
        "step/padding_ratio": 1 - metrics.tokens / max(1, metrics.padded_tokens),
        "step/flops_per_second": metrics.flops / metrics.step_time_s,
        "step/mfu": metrics.mfu,
        "step/memory_bytes": metrics.memory_bytes,
    }
    for name, task in metrics.tasks.items():
        values[f"loss/{name}"] = task.loss
        values[f"grad_norm/{name}"] = task.grad_norm
        values[f"lr/{name}"] = task.lr
        values[f"validation_loss/{name}"] = task.validation_loss
    for index, replica in enumerate(metrics.replicas):
        values[f"replica_busy_s/{index}_{replica.layout}"] = replica.busy_s
    return {name: float(value) for name, value in values.items() if value is not None}
