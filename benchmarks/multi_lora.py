"""Many adapters on one base: ours, PEFT's switching, and the frozen base alone, side by side.

All sides train the same steps on the same base with random weights, in turn, in one process; of
numbers of tasks, too, every one trains the same sequences. Sides:

    base           the frozen base alone, packed, no adapter and no update: the limit
    ours           the trainer's step on one rank
    peft-switching one task after the other, 4 rows a micro-batch as a Trainer does
    peft-sorted    the same with rows of like length, up to the most tokens, attention without mask
    peft-1-row, peft-8-rows

Rows are medians over the steps. TFLOP/s count the frozen model's operations alone; `share` is the
speed of whole steps over the base's, `compute_share` without updates (PEFT's include them);
launches, of kernels on a GPU and operators on a CPU, are those of one micro-batch's sequences,
updates left out, and `--operators` writes them. What was not measured is a dash. Ctrl-C ends it and
keeps what there is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.sides.base import PackedBase
from benchmarks.sides.bench import Bench, Builders
from benchmarks.sides.job import JOBS, Job, JobName, save_model
from benchmarks.sides.lengths import find_lengths
from benchmarks.sides.operators import write_operators
from benchmarks.sides.side import Setting, Side, alone_on, weights_dtype
from benchmarks.sides.switching import sorted_switching, switching
from lobra.common.errors import ConfigError
from lobra.common.options import Device, PositiveInt, as_options, option_problems
from lobra.profiler.hardware import describe_device, num_cores, resolve_device


def _ours(setting: Setting) -> Side:
    from benchmarks.sides.ours import Ours  # brings in deepspeed, which must know its device first

    return Ours(setting)


SIDES: Builders = {
    "base": PackedBase,
    "ours": _ours,
    "peft-switching": switching(4),
    "peft-sorted": sorted_switching,
    "peft-1-row": switching(1),
    "peft-8-rows": switching(8),
}
PEFT = "peft-"  # so its sides' names begin
USUAL = ("base", "ours", "peft-switching", "peft-sorted")


@dataclass(frozen=True)
class Experiment:
    """What an experiment varies, where the command line does not say it."""

    tasks: tuple[int, ...]
    ranks: tuple[int, ...]
    sides: tuple[str, ...]


EXPERIMENTS = {
    "adapters": Experiment((1, 4, 16, 64), (16,), USUAL),
    "ranks": Experiment((4,), (8, 16, 32, 64, 128), USUAL),
    "batching": Experiment((4,), (16,), tuple(SIDES)),
}


@as_options
@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared.

    Parameters
    ----------
    job
        Sizes of the model and of a step; by default the device's.
    experiment
        What varies: the number of adapters, their rank, or how micro-batches are made.
    tasks
        Numbers of tasks, instead of the experiment's.
    rank
        Ranks of the adapters, instead of the experiment's.
    peft_tasks
        With which of the numbers of tasks PEFT's sides are measured, too; by default with all.
    sides
        Of those above, instead of the experiment's.
    steps
        Timed.
    max_tokens
        Most tokens of a micro-batch, instead of the job's.
    cap
        Tokens at which sequences are cut, instead of the job's.
    sequences
        Of a step, instead of the job's.
    lengths
        JSON of lengths by data set.
    threads
        Of a processor; by default one a core.
    operators
        CSV of launches to write.
    """

    device: Device = "auto"
    job: JobName | None = None
    experiment: Literal["adapters", "ranks", "batching"] = "adapters"
    tasks: tuple[PositiveInt, ...] = ()
    peft_tasks: tuple[PositiveInt, ...] = ()
    rank: tuple[PositiveInt, ...] = ()
    sides: tuple[str, ...] = ()
    steps: PositiveInt = 3
    max_tokens: PositiveInt | None = None
    cap: PositiveInt | None = None
    sequences: PositiveInt | None = None
    lengths: Path | None = None
    threads: PositiveInt | None = None
    operators: Path | None = None


USUAL_COMPARISON = Comparison()


def multi_lora(*, options: Comparison = USUAL_COMPARISON) -> Iterator[dict[str, Any]]:
    """Train the same steps on every side, in turn, and compare.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    device = resolve_device(options.device)
    usual = EXPERIMENTS[options.experiment]
    varied = Experiment(
        options.tasks or usual.tasks, options.rank or usual.ranks, options.sides or usual.sides
    )
    job = _sized(JOBS[options.job or device], options)
    peft_tasks = options.peft_tasks or varied.tasks
    if problems := [*option_problems(options), *_problems(job, varied, peft_tasks)]:
        raise ConfigError(problems)
    lengths = find_lengths(job.datasets, options.lengths)
    threads = options.threads or num_cores()
    yield {
        **describe_device(device),
        "threads": threads,
        "lengths": lengths.source,
        "job": asdict(job),
    }
    torch.set_num_threads(threads)

    def builders(num_tasks: int) -> Builders:
        is_too = num_tasks in peft_tasks
        return {n: SIDES[n] for n in varied.sides if is_too or not n.startswith(PEFT)}

    bench = Bench(builders, job, lengths, device, options.steps)
    with tempfile.TemporaryDirectory() as name, alone_on(device):
        folder = Path(name) / "model"
        save_model(job.model, folder, weights_dtype(device), device)
        try:
            yield from bench.run(folder, varied.tasks, varied.ranks)
        finally:
            if options.operators is not None:
                write_operators(options.operators, bench.launches)


def _sized(job: Job, options: Comparison) -> Job:
    """Return the job with the sizes that the command line gives."""
    return replace(
        job,
        max_tokens=options.max_tokens or job.max_tokens,
        cap=options.cap or job.cap,
        num_sequences=options.sequences or job.num_sequences,
    )


def _problems(job: Job, varied: Experiment, peft_tasks: Sequence[int]) -> Iterator[str]:
    """Yield what cannot be compared."""
    for name in varied.sides:
        if name not in SIDES:
            yield f"--sides: {name!r} is not one of {', '.join(SIDES)}"
    for number in peft_tasks:
        if number not in varied.tasks:
            yield f"--peft-tasks: {number} is not one of {', '.join(map(str, varied.tasks))}"
    if job.cap < 2 or job.max_tokens < job.cap:
        yield (
            f"--cap {job.cap}, --max-tokens {job.max_tokens}: sequences of at least 2 tokens, "
            f"micro-batches that hold the longest"
        )
    share = len(job.datasets)
    if job.num_sequences < max(share, *varied.tasks) or job.num_sequences % share:
        yield (
            f"--sequences: {job.num_sequences}; a multiple of {share}, the data sets, and at "
            f"least one a task"
        )
