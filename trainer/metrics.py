"""What is measured of a step, and metrics.jsonl, which has a line of it for every step."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

from lobra.common.documents import parse_json
from lobra.common.errors import Problems
from lobra.common.files import atomic_path
from lobra.common.models import read_as
from lobra.trainer import log_parts
from lobra.trainer.log_parts import METRICS_FILE
from lobra.trainer.logged_step import LoggedStep

log = logging.getLogger(__name__)

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
    """Appends a line a step to metrics.jsonl; what it holds is moved away when it is full.

    The file appears with the first step: a run that fails before leaves none. Lines that find no
    room are kept and written when there is some again: a full disk is warned of once and ends no
    run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / METRICS_FILE
        self._file: BinaryIO | None = None
        self._waiting: deque[tuple[int, bytes]] = deque(maxlen=MOST_WAITING)  # step, line
        self._has_warned = False

    def write(self, metrics: StepMetrics) -> None:
        """Write one step and flush it, so that a crash loses nothing already seen."""
        line = json.dumps(as_json(metrics)).encode() + b"\n"
        self._waiting.append((metrics.step, line))
        try:
            while self._waiting:
                self._append(*self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._has_warned:
                log.warning(
                    "%s: cannot be written (%s); the run goes on, its steps are added when they "
                    "can be",
                    self._path, error.strerror,
                )  # fmt: skip
            self._has_warned = True

    def _append(self, step: int, line: bytes) -> None:
        """Write a step's line; of one for which there is no room nothing is left."""
        file, end = self._opened()
        if end and end + len(line) > log_parts.MOST_BYTES:
            self.close()
            log_parts.move_away(self._path.parent, step)
            file, end = self._opened()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(end)
            raise

    def _opened(self) -> tuple[BinaryIO, int]:
        """Return the file, and how many bytes it has."""
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        return self._file, self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


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
    """What a run that goes on keeps of its log, and what is wrong with the rest.

    Attributes
    ----------
    steps
        The steps (from 0) that it has, all before the one it goes on at.
    damage
        Why lines, or all of them, are left out.
    is_of_another_run
        Whether all of them are.
    """

    steps: frozenset[int]
    damage: Problems
    is_of_another_run: bool

    def missing(self, step: int) -> list[int]:
        """Return the steps before ``step`` (from 0) that reports will not have."""
        return sorted(set(range(step)) - self.steps)


def kept_metrics(folder: Path, step: int, last: dict[str, Any] | None) -> KeptMetrics:
    """Return what a run that goes on after ``step`` steps keeps of its log; change nothing.

    ``last``, if it is known, is the line of the step before, which its checkpoint holds: a run that
    was killed before it had written that gets it back. A log is no reason not to train: lines that
    are no step's are left out, and all of them if the file is another run's.
    """
    damage = Problems()
    steps = set()
    is_of_another_run = False
    for entry in _ascending_steps(folder, damage):
        if entry["step"] < step:
            steps.add(entry["step"])
        if last is not None and entry["step"] == last["step"]:
            is_of_another_run = entry.get("tasks") != last.get("tasks")
    if is_of_another_run and last is not None:
        damage.add(
            f"{folder / METRICS_FILE}: step {last['step']} is not the step that the checkpoint was "
            f"saved after: the file is of another run"
        )
        steps.clear()
    if last is not None:
        steps.add(last["step"])
    return KeptMetrics(frozenset(steps), damage, is_of_another_run)


def restore_metrics(folder: Path, step: int, last: dict[str, Any] | None) -> None:
    """Make the log what it was after `step` steps, for a run that goes on from there.

    Steps that will be trained again are removed. Files of which not all is kept that should be
    are set aside, with the suffix ``.damaged``. Parts that end before the step stay as they are.
    """
    path = folder / METRICS_FILE
    kept = kept_metrics(folder, step, last)
    files = log_parts.log_files(folder)
    parts = {} if kept.damage else log_parts.log_parts(folder)
    whole = {until: part for until, part in parts.items() if until <= step}
    begin = max(whole, default=0)
    entries = () if kept.is_of_another_run else _ascending_steps(folder, Problems())
    if kept.steps or files:
        with atomic_path(path) as draft:
            with draft.open("w", encoding="utf-8") as file:
                for entry in entries:
                    if last is not None and entry["step"] == last["step"]:
                        last = None
                    if begin <= entry["step"] < step:
                        file.write(json.dumps(entry) + "\n")
                if last is not None:
                    file.write(json.dumps(last) + "\n")
            if kept.damage:
                log_parts.remove_log(files, keep_aside=True)
    if kept.damage:
        log.warning("%s: set aside as %s.damaged: %s", path, path.name, kept.damage)
    else:
        log_parts.remove_log(set(files) - {path, *whole.values()})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the steps of a run; a last line cut short by a crash is left out.

    Raises
    ------
    ConfigError
        The log cannot be read, or a line before the last is not a step's.
    """
    problems = Problems()
    steps = list(_logged_steps(log_parts.log_files(folder) or [folder / METRICS_FILE], problems))
    problems.raise_if_any()
    return steps


def _ascending_steps(folder: Path, problems: Problems) -> Iterator[dict[str, Any]]:
    """Yield the steps of a log, if there is one, without those that come after a later one."""
    last = -1
    for entry in _logged_steps(log_parts.log_files(folder), problems):
        if entry["step"] > last:
            last = entry["step"]
            yield entry
        else:
            problems.add(f"{folder / METRICS_FILE}: step {entry['step']} after step {last}")


def _logged_steps(files: Sequence[Path], problems: Problems) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log's files that are a step's, and note what is wrong with the others.

    A crash may have cut the very last one, of which nothing is noted.
    """
    for path in files:
        with problems.noted():
            lines = chain(log_parts.log_lines(path), [None])
            for number, (line, following) in enumerate(pairwise(lines), start=1):
                assert line is not None, "only the end is None"
                found = Problems()
                try:
                    entry = parse_json(line.decode())
                except ValueError as error:
                    if following is not None or path != files[-1]:
                        problems.add(f"{path}:{number}: not a step's line ({error})")
                    continue
                read_as(LoggedStep, entry, found)
                problems += found.prefixed(f"{path}:{number}: not a step's line: ")
                if not found:
                    yield entry
