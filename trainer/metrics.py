"""What is measured of a step, and metrics.jsonl, which has a line of it for every step."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lobra.common.documents import check_regular, parse_json, reading
from lobra.common.errors import Problems
from lobra.common.files import write_atomic
from lobra.common.models import read_as
from lobra.trainer.logged_step import LoggedStep

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
MOST_WAITING = 10_000  # lines kept while there is no room for them: some 20 MB


@dataclass(frozen=True)
class TaskMetrics:
    """One task's step.

    Attributes
    ----------
    loss
        Mean loss per target token; of an objective that compares answers its loss per example.
    tokens
        Target tokens.
    sequences
        Sequences of the task's batch.
    grad_norm
        Of the gradient before it was clipped.
    lr
        The learning rate.
    applied
        Whether the update was made.
    own_step
        How many steps the task had taken part in before.
    validation_loss
        The held-out sequences' mean loss, where an evaluation period ended.
    stopped
        Why this step was the task's last before its steps were over.
    flops
        The model's floating-point operations for the task.
    preferences
        Of an objective that compares answers their rewards and log-probabilities, by TRL's names
        (`trained_step.preferences`).
    """

    loss: float
    tokens: int
    sequences: int
    grad_norm: float
    lr: float
    applied: bool
    own_step: int
    validation_loss: float | None = None
    stopped: str | None = None
    flops: float = 0.0
    preferences: dict[str, float] | None = None


@dataclass(frozen=True)
class DrawnBatch:
    """Which examples of a task a step trained: an entry of the ledger (`trainer.ledger`).

    Attributes
    ----------
    own_step
        How many steps the task had taken part in before.
    epoch, position
        Where the batch begins, each counted from 0.
    size
        Examples of the batch; what an epoch has no more of is of the next one.
    examples
        Of an epoch.
    digest
        Of the sequences that the step's order had.
    """

    own_step: int
    epoch: int
    position: int
    size: int
    examples: int
    digest: str


@dataclass(frozen=True)
class ReplicaMetrics:
    """One replica's step.

    Attributes
    ----------
    layout
        As in a plan's text.
    busy_s
        Seconds its busiest rank computed.
    predicted_s
        Seconds predicted, with its speed factor.
    speed_factor
        Its measured time over the cost model's, as far as it was known.
    micro_batches, padded_tokens
        What it was given.
    """

    layout: str
    busy_s: float
    predicted_s: float
    speed_factor: float
    micro_batches: int
    padded_tokens: int


@dataclass(frozen=True)
class StepMetrics:
    """One step; the parts of its time are rank 0's.

    Attributes
    ----------
    step
        Counted from 0.
    step_time_s, gpu_seconds
        Without `validation_time_s` and `checkpoint_time_s` (exports included), which came after the
        step.
    predicted_step_time_s
        By the cost model, with the replicas' speed factors.
    dispatch_time_s
        What dispatching took, while the step before was training.
    dispatch_wait_s
        What the step waited for its order.
    prepare_time_s
        Making the order's tensors.
    replica_wait_s
        Ready, but waiting for the slowest rank.
    reduce_time_s
        Summing the gradients.
    optimizer_time_s
        Updating and exchanging the adapters.
    tokens, padded_tokens
        Over all tasks.
    memory_bytes
        The most any rank has had in use, in an evaluation after the step too.
    tasks
        By name, those with targets in the step.
    drawn
        By name, what the step trained of every task that took part.
    replicas
        In the plan's order.
    plan_from
        The step from which on the run has had its plan, as an entry of `plans` in config.yaml says.
    tokens_per_s
        Of the tokens, none of padding.
    flops
        The model's floating-point operations (`profiler.flops`).
    mfu
        Their share of what the GPUs could have done in the step's time; None where their peak is
        not known, and on CPUs.
    """

    step: int
    step_time_s: float
    predicted_step_time_s: float
    dispatch_time_s: float
    dispatch_wait_s: float
    prepare_time_s: float
    replica_wait_s: float
    reduce_time_s: float
    optimizer_time_s: float
    tokens: int
    padded_tokens: int
    gpu_seconds: float
    memory_bytes: int
    tasks: dict[str, TaskMetrics]
    replicas: list[ReplicaMetrics]
    validation_time_s: float = 0.0
    checkpoint_time_s: float = 0.0
    plan_from: int = 0
    tokens_per_s: float = 0.0
    flops: float = 0.0
    mfu: float | None = None
    drawn: dict[str, DrawnBatch] = field(default_factory=dict)


class MetricsFile:
    """Appends a line a step to metrics.jsonl.

    The file appears with the first step: a run that fails before leaves none. Lines that find no
    room are kept and written when there is some again: a full disk is warned of once and ends no
    run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._file: BinaryIO | None = None
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._has_warned = False

    def write(self, metrics: StepMetrics) -> None:
        """Write one step and flush it, so that a crash loses nothing already seen."""
        self._waiting.append(json.dumps(as_json(metrics)).encode() + b"\n")
        try:
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._append(self._file, self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._has_warned:
                log.warning(
                    "%s: cannot be written (%s); the run goes on, its steps are added when they "
                    "can be",
                    self._path, error.strerror,
                )  # fmt: skip
            self._has_warned = True

    @staticmethod
    def _append(file: BinaryIO, line: bytes) -> None:
        """Write a line; of one for which there is no room nothing is left."""
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def as_json(metrics: StepMetrics) -> dict[str, Any]:
    """Return a step as its line in metrics.jsonl holds it."""
    line: dict[str, Any] = _finite(asdict(metrics))
    return line


def _finite(value: Any) -> Any:
    """Return value with NaN and infinity as None: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class KeptMetrics:
    """What a run that goes on keeps of metrics.jsonl, and what is wrong with the rest.

    Attributes
    ----------
    steps
        Lines of steps before the one it goes on at, ascending.
    damage
        Why lines, or all of them, are left out.
    """

    steps: list[dict[str, Any]]
    damage: Problems

    def missing(self, step: int) -> list[int]:
        """Return the steps before ``step`` (0-based) that reports will not have."""
        return sorted(set(range(step)) - {entry["step"] for entry in self.steps})


def kept_metrics(folder: Path, step: int, last: dict[str, Any] | None) -> KeptMetrics:
    """Return what a run that goes on after ``step`` steps keeps of its log; change nothing.

    ``last``, if it is known, is the line of the step before, which its checkpoint holds: a run that
    was killed before it had written that gets it back. A log is no reason not to train: lines that
    are no step's are left out, and all of them if the file is another run's.
    """
    path = folder / METRICS_FILE
    found, damage = _logged_steps(folder) if os.path.lexists(path) else ([], Problems())
    steps: list[dict[str, Any]] = []
    for entry in found:
        if steps and entry["step"] <= steps[-1]["step"]:
            damage.add(f"{path}: step {entry['step']} after step {steps[-1]['step']}")
        else:
            steps.append(entry)
    steps = [entry for entry in steps if entry["step"] < step]
    if last is not None:
        known = {entry["step"]: entry for entry in steps}
        if known.setdefault(last["step"], last).get("tasks") != last.get("tasks"):
            damage.add(
                f"{path}: step {last['step']} is not the step that the checkpoint was saved after: "
                f"the file is of another run"
            )
            known = {last["step"]: last}
        steps = [known[number] for number in sorted(known)]
    return KeptMetrics(steps, damage)


def restore_metrics(folder: Path, step: int, last: dict[str, Any] | None) -> None:
    """Make metrics.jsonl what it was after `step` steps, for a run that goes on from there.

    Steps that will be trained again are removed. A file of which not all is kept that should be
    is set aside, as ``metrics.jsonl.damaged``.
    """
    path = folder / METRICS_FILE
    kept = kept_metrics(folder, step, last)
    if kept.damage:
        aside = path.with_name(f"{path.name}.damaged")
        log.warning("%s: set aside as %s: %s", path, aside.name, kept.damage)
        os.replace(path, aside)
    if kept.steps or path.exists():
        write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in kept.steps))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the steps of a run; a last line cut short by a crash is left out.

    Raises
    ------
    ConfigError
        The file cannot be read, or a line before the last is not a step's.
    """
    steps, problems = _logged_steps(folder)
    problems.raise_if_any()
    return steps


def _logged_steps(folder: Path) -> tuple[list[dict[str, Any]], Problems]:
    """Return the lines of metrics.jsonl that are a step's, and what is wrong with the others."""
    path = folder / METRICS_FILE
    problems = Problems()
    steps = []
    with problems.noted():
        check_regular(path)
        with reading(path):
            lines = path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            found = Problems()
            try:
                entry = parse_json(line.decode())
            except ValueError as error:
                if number < len(lines):
                    problems.add(f"{path}:{number}: not a step's line ({error})")
                continue
            read_as(LoggedStep, entry, found)
            problems += found.prefixed(f"{path}:{number}: not a step's line: ")
            steps += [] if found else [entry]
    return steps, problems
