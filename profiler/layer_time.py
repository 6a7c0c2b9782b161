"""The time profiler: milliseconds of one layer, forward + backward with LoRA, per tp and shape.

All shapes of a tp are measured by one group of processes, which appends each to the file as it is
measured. When a shape runs out of memory it is noted as such and the sweep goes on with the others.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.shapes import ModelShape, layout_problem
from lobra.layout.world import consecutive
from lobra.model.adapter import AdapterSpec
from lobra.model.launch import DEFAULT_PRELOAD, default_threads, run_ranks
from lobra.model.rank_results import RankError
from lobra.profiler.effort import QUICK, THOROUGH, Effort
from lobra.profiler.grid import time_grid
from lobra.profiler.head import HEAD_COLUMNS, PROFILED_SHARE
from lobra.profiler.layer_time_rank import SingleDevice
from lobra.profiler.memory import OUT_OF_MEMORY
from lobra.profiler.outliers import doubtful_shapes
from lobra.profiler.profiles import DEFAULT_POLICY, TIME_COLUMNS
from lobra.profiler.settings import adapter_settings, adapter_specs, model_settings
from lobra.profiler.sweep_file import Restart, open_sweep
from lobra.profiler.sweep_rows import SweepFile
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES

log = logging.getLogger(__name__)

NUM_KEYS = 3
POLL_S = 0.5


@dataclass(frozen=True)
class TimeSweep:
    """What to measure.

    Attributes
    ----------
    folder, shape
        The base model.
    tps
        Tensor-parallel sizes.
    max_seq_length, max_tokens
        The longest sequence, and the most tokens of a micro-batch.
    load_ranks
        Ranks that run at once, so that a machine with fewer cores than ranks is measured under
        the load training will have; 0 measures one replica alone.
    num_tasks, lora_rank
        Adapters, each on all linear layers; a micro-batch's rows are of any of them.
    precision, device
        "fp32" or "bf16"; "cpu" or "cuda".
    single_device
        One for each tp: time a shard on one device and model the collectives; empty: real groups.
    tasks
        Whose adapters to train instead of ``num_tasks`` of ``lora_rank``.
    links
        With ``single_device``: whose links the collectives are modelled with.
    memory
        The memory policy the layers run under.
    quick
        Fewer shapes, each run less often, none measured again.
    """

    folder: Path
    shape: ModelShape
    tps: tuple[int, ...]
    max_seq_length: int
    max_tokens: int
    load_ranks: int
    num_tasks: int
    lora_rank: int
    precision: str
    device: str
    single_device: tuple[SingleDevice, ...] = ()
    tasks: tuple[TaskConfig, ...] = ()
    links: str = ""
    memory: str = DEFAULT_POLICY
    quick: bool = False

    @property
    def effort(self) -> Effort:
        """How often each shape is run."""
        return QUICK if self.quick else THOROUGH

    @property
    def specs(self) -> tuple[AdapterSpec, ...]:
        """The adapters trained together."""
        if self.tasks:
            return adapter_specs(self.tasks)
        return tuple(
            AdapterSpec(f"task{task}", self.lora_rank, self.lora_rank, TARGET_MODULES)
            for task in range(self.num_tasks)
        )

    @property
    def grid(self) -> tuple[tuple[int, int], ...]:
        """The micro-batch shapes (b, s) to measure for each tp."""
        return time_grid(self.max_seq_length, self.max_tokens, self.quick)

    def num_replicas(self, tp: int) -> int:
        """Return how many groups of ``tp`` ranks are timed at once."""
        return max(1, self.load_ranks // tp)

    def num_ranks(self, tp: int) -> int:
        """Return the processes that time ``tp``."""
        return 1 if self.single_device else tp * self.num_replicas(tp)

    def settings(self) -> dict[str, Any]:
        """Return what must agree for rows of two sweeps to be comparable (not which rows)."""
        settings: dict[str, Any] = {
            **model_settings(self.shape),
            "load_ranks": self.load_ranks,
            "num_tasks": self.num_tasks,
            "lora_rank": self.lora_rank,
            "precision": self.precision,
            "device": self.device,
            "rows": "of tasks drawn in proportion to their global batch sizes, laid end to end",
        }
        if self.quick:
            settings["quick"] = True
        if self.tasks:
            settings |= adapter_settings(self.tasks)
            settings["global_batch_sizes"] = [task.global_batch_size for task in self.tasks]
        if self.device == "cpu" and (chosen := os.environ.get("OMP_NUM_THREADS")):
            settings["OMP_NUM_THREADS"] = chosen  # else an equal share of the cores
        if self.single_device:
            settings["collectives"] = "modelled: a shard's compute was timed on one device"
            settings["links"] = self.links
        return settings

    def problems(self) -> list[str]:
        """Return what is wrong with it, all at once."""
        problems = [
            f"time profile of {self.shape.name}: {problem}"
            for tp in self.tps
            if (problem := layout_problem(self.shape, tp, 1))
        ]
        if self.max_seq_length < 1 or self.max_tokens < 1:
            problems.append("--max-seq-length and --max-tokens: at least 1 token is needed")
        if self.load_ranks and self.single_device:
            problems.append("--load-ranks and --single-device: one or the other")
        elif self.load_ranks and self.load_ranks < max(self.tps):
            problems.append(
                f"--load-ranks {self.load_ranks}: less than tp {max(self.tps)}; give the number "
                f"of ranks training will have"
            )
        return problems


def open_files(
    sweep: TimeSweep,
    layer_path: Path,
    head_path: Path,
    restart: Restart,
    environment: dict[str, Any],
) -> tuple[SweepFile, SweepFile]:
    """Open the profiles of layers and of embedding and head, see `open_sweep`.

    Raises
    ------
    ConfigError
        If the sweep is not possible, or a file was made under other settings or is broken.
    """
    problems = sweep.problems()
    if problems:
        raise ConfigError(problems)
    layer_settings = sweep.settings() | {"what": "one layer, forward + backward, ms"}
    head_settings = sweep.settings() | {
        "what": "embedding and head with loss, forward + backward, ms",
        "label_share": PROFILED_SHARE,
    }
    layers, head = (
        open_sweep(
            path,
            columns,
            NUM_KEYS,
            settings,
            kind="measured on a single device" if sweep.single_device else "measured",
            restart=restart,
            environment=environment,
            memory=memory,
        )
        for path, columns, settings, memory in (
            (layer_path, TIME_COLUMNS, layer_settings, sweep.memory),
            (head_path, HEAD_COLUMNS, head_settings, DEFAULT_POLICY),  # nothing is computed again
        )
    )
    return layers, head


def missing_shapes(
    sweep: TimeSweep, tp: int, files: tuple[SweepFile, SweepFile]
) -> tuple[tuple[int, int], ...]:
    """Return the (b, s) of ``tp`` that one of the files still lacks, in order."""
    skipped = set().union(*(file.skipped for file in files))
    return tuple(
        (b, s)
        for b, s in sweep.grid
        if (tp, s, b) not in skipped and any((tp, s, b) not in file.done for file in files)
    )


def sweep_time(
    sweep: TimeSweep,
    files: tuple[SweepFile, SweepFile],
    report: Callable[[int, int], None] = lambda tp, left: None,
    ready: Callable[[int], bool] = lambda tp: True,
) -> tuple[SweepFile, SweepFile]:
    """Measure every shape the files lack and return the files as they then are.

    Parameters
    ----------
    files
        Of layers and of embedding and head (`open_files`); the rank processes append to them.
    report
        ``report(tp, shapes left)``, called from time to time; none are left while rows that stick
        out are measured again.
    ready
        Whether this machine can run that tp; others are left out.

    Raises
    ------
    RankError
        If a rank failed for another reason than memory; what was measured before is kept.
    """
    for tp in filter(ready, sweep.tps):
        checked = False
        while shapes := missing_shapes(sweep, tp, files):
            report(tp, len(shapes))
            try:
                _measure(sweep, tp, shapes, files, report)
                failure, checked = None, True
            except RankError as error:
                if not OUT_OF_MEMORY.search(str(error)):
                    raise
                failure = error
            files = files[0].reopened(), files[1].reopened()
            left = missing_shapes(sweep, tp, files)
            if failure is not None and left:
                b, s = left[0]  # they are measured in order
                log.warning("tp %d: %d x %d ran out of memory and is left out", tp, b, s)
                files[0].skip((tp, s, b), "ran out of memory")
        again = sweep.effort.attempts > 1 and not checked
        if again and any(doubtful_shapes(file, tp) for file in files):
            _measure(sweep, tp, (), files, report)  # a sweep before this one was ended too early
            files = files[0].reopened(), files[1].reopened()
        report(tp, 0)
    return files


def _measure(
    sweep: TimeSweep,
    tp: int,
    shapes: tuple[tuple[int, int], ...],
    files: tuple[SweepFile, SweepFile],
    report: Callable[[int, int], None],
) -> None:
    """Run the ranks that measure `shapes`, and again what then sticks out; report progress."""
    shards = [single for single in sweep.single_device if single.tp == tp]
    watched = files[0 if any((tp, s, b) not in files[0].done for b, s in shapes) else 1]
    count, size = (1, 1) if shards else (sweep.num_replicas(tp), tp)
    world = consecutive([Layout(size, 1, memory=sweep.memory)] * count)
    ended = threading.Event()
    before = watched.num_rows_on_disk()

    def watch() -> None:
        while not ended.wait(POLL_S):
            report(tp, len(shapes) - (watched.num_rows_on_disk() - before))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run_ranks(
            "lobra.profiler.layer_time_rank:time_shapes_on_rank",
            world.num_ranks,
            {
                "folder": sweep.folder,
                "world": world,
                "specs": sweep.specs,
                "shapes": shapes,
                "precision": sweep.precision,
                "base_precision": sweep.shape.quantised,
                "device": sweep.device,
                "layer_file": files[0],
                "head_file": files[1],
                "single_device": shards[0] if shards else None,
                "task_weights": [float(task.global_batch_size) for task in sweep.tasks],
                "effort": sweep.effort,
            },
            device=sweep.device,
            # A shard timed alone has the share of the cores that it would have in its group.
            threads=default_threads(tp) if shards else None,
            preload=(*DEFAULT_PRELOAD, "lobra.profiler.layer_time_rank"),
        )
    finally:
        ended.set()
        watcher.join()
