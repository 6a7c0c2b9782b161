"""Rank functions that break something on purpose, inside the rank process."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from lobra.layout.order import StepOrder
from lobra.model.embedding import VocabParallelEmbedding
from lobra.model.joint_stack import JointStack
from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.stage import Stage
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer import control, coordinator, engine, rank
from lobra.trainer.block import BlockOptimizer
from lobra.trainer.checkpoint import CheckpointWriter
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.engine import Engine
from lobra.trainer.optimizer import AdapterOptimizer
from lobra.trainer.rank import RankResult, train_rank
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.zero import Partition

FAULT_TASK = 1
FAULT_STEPS = (1, 2)
RAISING_TASK, SPOILT_TASK = 1, 2
SLOW_REPLICA = 0
SLOW_WRITE_S = 0.3  # a task's files
MOST_FILE_BYTES = 1000
WARNINGS = "warnings.txt"
FAULT_FILE = "fault.json"  # in a run's folder
STEP_BYTES, EVALUATION_BYTES = 1 << 40, 3 << 40
FAST_S, SLOW_S = 0.002, 0.006  # a micro-batch


def train_with_bad_data(run: RunSpec) -> RankResult:
    """Train while what one task's tokens are read as is NaN in some steps.

    Tokens are whole numbers, so this is as near to the data as a NaN can be: where they become
    vectors. The task's rows lie in micro-batches together with other tasks' rows.
    """
    plain_hidden, plain_embed = Stage.hidden, VocabParallelEmbedding.forward
    now: dict[str, Any] = {}

    def begin(order: StepOrder) -> StepOrder:
        now["bad"] = order.step in FAULT_STEPS
        return order

    def hidden(
        self: Stage, batch: MicroBatchTensors, received: torch.Tensor | None
    ) -> torch.Tensor:
        now["tokens"] = [own for own in batch.segments if own.number == FAULT_TASK]
        return plain_hidden(self, batch, received)

    def embed(self: VocabParallelEmbedding, tokens: torch.Tensor) -> torch.Tensor:
        embedded = plain_embed(self, tokens)
        if now["bad"]:
            for own in now["tokens"]:
                embedded.flatten(0, 1)[own.start : own.stop] = float("nan")
        return embedded

    change_orders(begin)
    Stage.hidden = hidden  # type: ignore[method-assign]
    VocabParallelEmbedding.forward = embed  # type: ignore[method-assign]
    return train_rank(run)


def train_with_failing_updates(run: RunSpec) -> RankResult:
    """Train while updates of two tasks fail on one rank each, after they were made there.

    In its second step `RAISING_TASK`'s raises on the last rank; in its third `SPOILT_TASK`'s leaves
    a weight that is not finite on the first. Rank 0 leaves what it warned of in `WARNINGS`.
    """
    install, update = BlockOptimizer.install, Partition.update
    numbers: dict[int, int] = {}  # of tasks, by their partitions
    now: dict[str, int] = {}

    def begin(order: StepOrder) -> StepOrder:
        now["step"] = order.step
        return order

    def noted(self: BlockOptimizer, number: int, *args: Any) -> None:
        install(self, number, *args)
        numbers[id(self.partitions[number])] = number

    def fail(self: Partition, *args: Any) -> None:
        update(self, *args)
        struck = (now["step"], numbers[id(self)], dist.get_rank())
        if struck == (1, RAISING_TASK, dist.get_world_size() - 1):
            raise ValueError("odd")
        if struck == (2, SPOILT_TASK, 0):
            self.master_p[0] = float("inf")

    change_orders(begin)
    BlockOptimizer.install = noted  # type: ignore[method-assign, assignment]
    Partition.update = fail  # type: ignore[method-assign]
    with warnings_kept(run):
        return train_rank(run)


@contextmanager
def warnings_kept(run: RunSpec) -> Iterator[None]:
    """Have rank 0 leave what it warned of in `WARNINGS`."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lobra").addHandler(handler)
    yield
    if dist.get_rank() == 0:
        (run.output_dir / WARNINGS).write_text("\n".join(warnings))


def train_joined_with_bad_data(run: RunSpec) -> RankResult:
    """Do the same with all tasks of a micro-batch computed at once, as on a GPU."""
    engine.build_stage = partial(engine.build_stage, stack_type=JointStack)
    return train_with_bad_data(run)


def train_joined(run: RunSpec) -> RankResult:
    """Train with all tasks of a micro-batch computed at once, as on a GPU."""
    engine.build_stage = partial(engine.build_stage, stack_type=JointStack)
    return train_rank(run)


def train_without_task(run: RunSpec) -> RankResult:
    """Train while the same task takes no part in the same steps (its sequences weigh nothing)."""

    def without(order: StepOrder) -> StepOrder:
        if order.step not in FAULT_STEPS:
            return order
        return replace(order, updates=tuple(u for u in order.updates if u.task != FAULT_TASK))

    change_orders(without)
    return train_rank(run)


def change_orders(change: Callable[[StepOrder], StepOrder]) -> None:
    """Have this rank's engine carry out what a function makes of its orders."""
    plain = Engine.carry_out

    def carry_out(self: Engine, order: StepOrder, state: Any = None) -> Any:
        return plain(self, change(order), state)

    Engine.carry_out = carry_out  # type: ignore[method-assign]


def train_asleep(run: RunSpec) -> RankResult:
    """Go through the motions: a replica takes its time for each micro-batch, one of them longer.

    Nothing is computed and nobody sleeps: a rank's clock goes forward by what its micro-batches
    take, and where all ranks meet it is as late as the latest.
    """
    now = [0.0]

    def sleep(stage: Any, batches: list, num_tasks: int, **_: Any) -> torch.Tensor:
        slow = stage.groups.place.replica == SLOW_REPLICA
        now[0] += (SLOW_S if slow else FAST_S) * len(batches)
        return torch.zeros(num_tasks)

    plain = AdapterOptimizer.reduce

    def meet(self: AdapterOptimizer, numbers: Any) -> torch.Tensor:
        latest = torch.tensor(now, dtype=torch.float64)
        dist.all_reduce(latest, op=dist.ReduceOp.MAX)
        now[0] = float(latest)
        return plain(self, numbers)

    clock: Any = SimpleNamespace(perf_counter=lambda: now[0])
    engine.time = coordinator.time = clock
    engine.run_replica = sleep  # type: ignore[assignment]
    AdapterOptimizer.reduce = meet  # type: ignore[method-assign]
    return train_rank(run)


def train_with_a_counter(run: RunSpec) -> RankResult:
    """Train with a counter of memory as GPUs have it: the peak since it was last read.

    A step takes `STEP_BYTES`, an evaluation `EVALUATION_BYTES`, on rank 1 twice that.
    """
    peak = [0]

    def taken(size: int, plain: Any) -> Any:
        def take(*args: Any, **more: Any) -> Any:
            peak[0] = max(peak[0], size * (1 + dist.get_rank()))
            return plain(*args, **more)

        return take

    def read() -> int:
        found, peak[0] = peak[0], 0
        return found

    control.step_memory_bytes = read
    rank._peak_memory_bytes = lambda engine: engine.peak_memory_bytes
    engine.run_replica = taken(STEP_BYTES, engine.run_replica)  # type: ignore[assignment]
    engine.evaluate_replica = taken(  # type: ignore[assignment]
        EVALUATION_BYTES, engine.evaluate_replica
    )
    return train_rank(run)


def run_out_of_disk(run: RunSpec, steps: Container[int] = FAULT_STEPS) -> RankResult:
    """Train while no file may grow beyond `MOST_FILE_BYTES` in some steps: EFBIG, by the kernel.

    Rank 0 leaves what it warned of in `WARNINGS`; standard error may be such a file too.
    """
    plain = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(order: StepOrder) -> StepOrder:
        if order.updates:
            most = MOST_FILE_BYTES if order.step in steps else plain[0]
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, plain[1]))
        return order

    change_orders(limit)
    with warnings_kept(run):
        return train_rank(run)


def run_out_of_disk_for_good(run: RunSpec) -> RankResult:
    """Do the same in every step."""
    return run_out_of_disk(run, range(run.last_step))


def run_out_of_memory(run: RunSpec) -> RankResult:
    """Train until rank 1 has no memory left for its second step."""
    plain = engine.run_replica
    calls = []

    def full(stage: Any, batches: list, num_tasks: int, **more: Any) -> torch.Tensor:
        calls.append(1)
        if dist.get_rank() == 1 and len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(stage, batches, num_tasks, **more)

    engine.run_replica = full  # type: ignore[assignment]
    return train_rank(run)


def train_without_data(run: RunSpec) -> RankResult:
    """Train; only rank 0 can read the data."""

    def fail(folder: object) -> None:
        raise OSError(f"{folder}: not here")

    if dist.get_rank():
        TokenizedDataset.load = fail  # type: ignore[method-assign, assignment]
    return train_rank(run)


def train_and_count_collectives(run: RunSpec) -> dict[str, list[int]]:
    """Train and return, per kind of exchange of adapters, the elements of each call."""
    calls: dict[str, list[int]] = {"reduce_scatter_tensor": [], "all_gather_into_tensor": []}
    for name, sizes in calls.items():
        plain = getattr(dist, name)

        def counted(out: torch.Tensor, part: torch.Tensor, *args: Any, _plain=plain, _sizes=sizes,
                    **kwargs: Any) -> object:  # fmt: skip
            _sizes.append(max(out.numel(), part.numel()))
            return _plain(out, part, *args, **kwargs)

        setattr(dist, name, counted)
    kept: dict[str, list[int]] = {}

    def note(order: StepOrder) -> StepOrder:
        if order.step == 0:
            for sizes in calls.values():
                sizes.clear()  # what deepspeed did when it started
        if order.save:
            kept.update({name: list(sizes) for name, sizes in calls.items()})
        return order

    change_orders(note)
    train_rank(run)
    return kept


def save_slowly(run: RunSpec) -> dict[str, list[float]]:
    """Train and save a checkpoint, rank 0 taking its time over each task's files.

    Returns
    -------
    When, on the machine's one clock, this rank had `written` each task and began to `gather`
    each task's moments.
    """
    times: dict[str, list[float]] = {"written": [], "gather": []}
    add_task, moments = CheckpointWriter.add_task, AdapterOptimizer.moments

    def add_slowly(self: CheckpointWriter, *args: Any) -> None:
        time.sleep(SLOW_WRITE_S)
        add_task(self, *args)
        times["written"].append(time.monotonic())

    def noted(self: AdapterOptimizer, number: int) -> dict[str, dict[range, torch.Tensor]]:
        times["gather"].append(time.monotonic())
        return moments(self, number)

    CheckpointWriter.add_task = add_slowly  # type: ignore[method-assign]
    AdapterOptimizer.moments = noted  # type: ignore[method-assign]
    train_rank(run)
    return times


def train_and_signal(run: RunSpec) -> RankResult:
    """Train; rank 0 sends its parent's signal to itself after the third step."""
    plain = Engine.carry_out

    def carry_out(self: Engine, order: StepOrder, state: Any = None) -> Any:
        report = plain(self, order, state)
        if order.updates and order.step == 2 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    Engine.carry_out = carry_out  # type: ignore[method-assign]
    return train_rank(run)


def train_with_fault(run: RunSpec) -> RankResult:
    """Train, and let one rank come to grief in one step, as `FAULT_FILE` says, but only once."""
    file = run.output_dir / FAULT_FILE
    if not file.exists():
        return train_rank(run)
    fault = json.loads(file.read_text())

    def strike(order: StepOrder) -> StepOrder:
        if dist.get_rank() == fault["rank"] and order.step == fault["step"] and order.updates:
            file.unlink()
            FAULTS[fault["kind"]](run)
        return order

    change_orders(strike)
    return train_rank(run)


def _kill(_run: RunSpec, number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)  # a signal may take its time


def _fail(_run: RunSpec) -> None:
    raise ValueError("odd")


def _hang(_run: RunSpec) -> None:
    def forever(*_args: object, **_more: object) -> NoReturn:
        while True:
            time.sleep(0.1)

    engine.run_replica = forever  # type: ignore[assignment]


def _damage(run: RunSpec) -> None:
    """Flip a bit of the newest checkpoint's moments and die."""
    step = list_checkpoints(run.output_dir)[-1]
    path = next((step_folder(run.output_dir, step) / "moments").iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    _kill(run)


def _die_while_saving(_run: RunSpec) -> None:
    CheckpointWriter.finish = lambda *args: _kill(*args[:1])  # type: ignore[method-assign]


def _refuse_files(_run: RunSpec) -> None:
    """Let no file be written from now on: the run ends when its last checkpoint cannot be."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_FILE_BYTES, hard))


FAULTS: dict[str, Callable[[RunSpec], None]] = {
    "killed": _kill,
    "segmentation fault": partial(_kill, number=signal.SIGSEGV),
    "left": lambda _run: os._exit(3),
    "raises": _fail,
    "stopped": partial(_kill, number=signal.SIGSTOP),
    "hangs": _hang,
    "damages and dies": _damage,
    "dies while saving": _die_while_saving,
    "no room": _refuse_files,
}
