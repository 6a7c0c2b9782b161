"""A job measured: sides that are built side by side and train the same steps in turn."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.sides.base import first_fit_decreasing
from benchmarks.sides.job import Job, step_flops
from benchmarks.sides.lengths import Lengths
from benchmarks.sides.operators import Launch, launches_of
from benchmarks.sides.result import Result, TimedStep, rows_of
from benchmarks.sides.side import Setting, Side, Step, Trained
from lobra.profiler.peak_memory import peak_bytes_of, status_bytes

Builders = Mapping[str, Callable[[Setting], Side]]


class Bench:
    """Measures on a device the sides that `builders` returns for a number of tasks."""

    def __init__(
        self,
        builders: Callable[[int], Builders],
        job: Job,
        lengths: Lengths,
        device: str,
        num_steps: int,
    ) -> None:
        self.builders = builders
        self.job = job
        self.lengths = lengths
        self.device = device
        self.num_steps = num_steps
        self.launches: list[tuple[str, Launch]] = []
        self.begin_s = time.perf_counter()
        self.num_done = self.num_turns = 0

    def run(
        self, folder: Path, numbers_of_tasks: Sequence[int], ranks: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Yield a row of every side on the model in the folder, for every number of tasks and rank.

        Whatever ends it, Ctrl-C too, is raised after the rows of what was measured.
        """
        settings = [
            Setting(folder, self.job, num_tasks, rank, self.device)
            for num_tasks, rank in product(numbers_of_tasks, ranks)
        ]
        # of every side: the first step, which warms up, the timed ones, and one under the profiler
        num_sides = sum(len(self.builders(setting.num_tasks)) for setting in settings)
        self.num_turns = num_sides * (self.num_steps + 2)
        for setting in settings:
            results: list[Result] = []
            try:
                self._measure(setting, results)
            except (Exception, KeyboardInterrupt):
                yield from rows_of(results)
                raise
            yield from rows_of(results)
            gc.collect()

    def _measure(self, setting: Setting, results: list[Result]) -> None:
        """Measure every side in a setting; results are there from the beginning."""
        entries: list[tuple[Side, Result]] = []
        for name, build in self.builders(setting.num_tasks).items():
            result = Result(name, setting.num_tasks, setting.rank)
            results.append(result)
            with self._memory_may_end(result):
                before = self._resident_bytes()
                side = build(setting)
                result.first_losses = self._train(side, result, 0)[0].losses
                result.held_bytes = self._resident_bytes() - before
                entries.append((side, result))
        for number in range(1, self.num_steps + 1):
            entries = [entry for entry in entries if entry[1].failure is None]
            for side, result in entries:
                with self._memory_may_end(result):
                    trained, taken_bytes = self._train(side, result, number)
                    step = self.job.step(self.lengths, number, setting.num_tasks)
                    tokens, flops = num_tokens(step), step_flops(self.job.model, step)
                    result.steps.append(TimedStep(number, tokens, flops, trained))
                    result.step_bytes = max(taken_bytes, result.step_bytes or 0)
        batch = self._mixed_batch(setting.num_tasks)
        for side, result in entries:
            if result.failure is None:
                with self._memory_may_end(result):
                    self._count(side, result, batch)

    def _mixed_batch(self, num_tasks: int) -> Step:
        """Return the sequences of a packed micro-batch with as many tasks as any, by task."""
        step = self.job.step(self.lengths, 0, num_tasks)
        batches = first_fit_decreasing(step, self.job.max_tokens)
        mixed = max(batches, key=lambda batch: len({sequence.task for sequence in batch}))
        return sorted(mixed, key=lambda sequence: sequence.index)

    @contextmanager
    def _memory_may_end(self, result: Result) -> Iterator[None]:
        """Note that a side has no memory left, which does not concern the others."""
        try:
            yield
        except torch.OutOfMemoryError:
            result.failure = "out of memory"
            torch.cuda.empty_cache()

    def _train(self, side: Side, result: Result, number: int) -> tuple[Trained, int]:
        """Train a step; return how it went and the most memory it took meanwhile, in bytes."""
        step = self.job.step(self.lengths, number, result.num_tasks)
        trained: list[Trained] = []
        self._resident_bytes()
        taken_bytes = peak_bytes_of(lambda: trained.append(side.train(step)), self.device)
        self._tell(result, f"{num_tokens(step) / trained[0].time_s:,.0f} tokens/s")
        return trained[0], taken_bytes

    def _count(self, side: Side, result: Result, batch: Step) -> None:
        """Count what one micro-batch's sequences launch."""
        launches = launches_of(lambda: side.train(batch), self.device)
        result.launches = len(launches)
        label = f"{result.side}, {result.num_tasks} tasks of rank {result.rank}"
        self.launches += [(label, launch) for launch in launches]
        self._tell(result, f"{len(launches):,} launches")

    def _resident_bytes(self) -> int:
        """Return the memory this process holds; on a CPU what was freed is given back first."""
        gc.collect()
        if self.device == "cuda":
            return torch.cuda.memory_allocated()
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)
        return status_bytes("VmRSS")

    def _tell(self, result: Result, what: str) -> None:
        self.num_done += 1
        left_s = (time.perf_counter() - self.begin_s) * (self.num_turns / self.num_done - 1)
        print(
            f"[{self.num_done}/{self.num_turns}] {result.num_tasks} tasks of rank {result.rank}, "
            f"{result.side}: {what}; about {left_s / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )


def num_tokens(step: Step) -> int:
    """Return the tokens of a step, padding left out."""
    return sum(len(sequence.tokens) for sequence in step)
