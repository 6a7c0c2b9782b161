"""`lobra profile time`: milliseconds of one layer, of embedding and head, and of collectives."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lobra.cli import resumable
from lobra.commands.profile_options import (
    ProfilerOptions,
    base_and_tasks,
    check_one_machine,
    environment_of,
    make_console,
    precision_of,
    profiler_problems,
    progress_bars,
)
from lobra.common.errors import ConfigError
from lobra.common.models import NumTokens, Rank, at_least, up_to
from lobra.common.options import Int, NonNegativeInt, Within, as_options
from lobra.layout.shapes import ModelShape, layout_problem
from lobra.model.folder import resolve_folder
from lobra.profiler.collectives import ALL_REDUCE, load_collectives
from lobra.profiler.cost_model import paths_beside
from lobra.profiler.head import HEAD_COLUMNS, PROFILED_SHARE
from lobra.profiler.lookup import profiled_name
from lobra.profiler.profiles import (
    DEFAULT_POLICY,
    TIME_COLUMNS,
    default_time_path,
    load_time_profile,
)
from lobra.profiler.sidecar import meta_path
from lobra.profiler.sweep_file import open_sweep

if TYPE_CHECKING:
    from lobra.profiler.accelerators import Tables
    from lobra.profiler.estimate_time import Workload
    from lobra.profiler.layer_time_rank import SingleDevice
    from lobra.tasks.config import TaskConfig

NUM_TASKS, LORA_RANK = 4, 16  # where neither they nor a trainer config are given
DEFAULT_MAX_SEQ_LENGTH = {"cpu": 2048, "cuda": 16384}
LayerTokens = Annotated[Int, Within(at_least(16)), Within(NumTokens)]


@as_options
@dataclass(frozen=True, kw_only=True)
class TimeOptions(ProfilerOptions):
    """What the time profiler is told.

    Parameters
    ----------
    tp
        Tensor-parallel sizes, such as 1,2,4.
    max_seq_length
        The longest sequence, in tokens; by default 2048 on CPU, 16384 on GPU.
    max_tokens
        Of a micro-batch; by default max-seq-length.
    load_ranks
        Time N/tp replicas at once and take the mean: what a machine with fewer cores than ranks
        will do in training; by default one replica alone.
    single_device
        Time one shard of each tp on one device and model the collectives (give --accelerator for a
        GPU's links, or --links).
    links
        With --single-device: all-reduces measured before (a profile of collectives), instead of
        those of the accelerator's data sheet.
    num_tasks
        Adapters (by default 4; of no consequence for an estimate).
    lora_rank
        Of each adapter (by default 16).
    trainer_config
        This config's adapters instead (a name or a path); of ranks that differ, an estimate takes
        the largest for all.
    head_output
        The CSV of embedding and head.
    collectives_output
        The CSV of collectives.
    quick
        A first look in a fraction of the time: half the shapes, each run a third as often.
    calibrate
        With --estimate: fit the efficiencies to the rows of tp 1 of this profile.
    """

    tp: str
    max_seq_length: LayerTokens | None = None
    max_tokens: LayerTokens | None = None
    load_ranks: Annotated[Int, NonNegativeInt, Parameter(metavar="N")] = 0
    single_device: bool = False
    links: Annotated[Path | None, Parameter(metavar="CSV")] = None
    num_tasks: Annotated[Int, Within(up_to(10_000))] | None = None
    lora_rank: Annotated[Int, Within(Rank)] | None = None
    trainer_config: str | None = None
    head_output: Path | None = None
    collectives_output: Path | None = None
    quick: bool = False
    calibrate: Annotated[Path | None, Parameter(metavar="CSV")] = None


def profile_time(*, options: TimeOptions) -> int:
    """Time one transformer layer, forward + backward with LoRA, for a few shapes of each tp.

    Also embedding and head; and, with several ranks, their messages. Every row is on disk as soon
    as it is measured: after a crash or Ctrl-C the same command goes on where it was.

      lobra profile time --model tiny --tp 1,2 --trainer-config quickstart
      lobra profile time --model 7B --tp 1,2,4,8 --estimate --accelerator A100-40GB

    Writes exp_result/profile/cost_model/profile_{time,head,collectives}_MODEL.csv and beside each a
    .meta.json that says how it was made.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    problems = profiler_problems(options)
    problems += _output_problems(options)
    if options.trainer_config:
        problems += [
            f"{name} and --trainer-config, which says so itself: give one of the two"
            for name, value in (
                ("--num-tasks", options.num_tasks),
                ("--lora-rank", options.lora_rank),
            )
            if value is not None
        ]
    problems.raise_if_any()
    with resumable():
        return _estimate(options) if options.estimate else _measure(options)


def _measure(options: TimeOptions) -> int:
    from lobra.profiler.hardware import num_devices, resolve_device
    from lobra.profiler.layer_time import TimeSweep, open_files, sweep_time

    tps = _tp_list(options.tp)
    check_one_machine(options.host_file, os.environ)
    device = resolve_device(options.device)
    length = _length(options, device)
    precision = precision_of(options.precision, device)
    shape, tasks = base_and_tasks(options, precision, device, options.trainer_config)
    sweep = TimeSweep(
        folder=resolve_folder(options.model),
        shape=shape,
        tps=tps,
        max_seq_length=length,
        max_tokens=options.max_tokens or length,
        load_ranks=options.load_ranks,
        num_tasks=options.num_tasks or NUM_TASKS,
        lora_rank=options.lora_rank or LORA_RANK,
        precision=precision,
        device=device,
        single_device=_single_devices(options, shape, tasks, precision, device, tps),
        tasks=tasks,
        links=_links(options),
        memory=options.memory,
        quick=options.quick,
    )
    layer_path, head_path, collectives_path = _paths(options)
    environment = environment_of(device)
    files = open_files(sweep, layer_path, head_path, options.restart, environment)
    console = make_console()
    limit = num_devices(device)
    too_many = [tp for tp in tps if limit is not None and sweep.num_ranks(tp) > limit]
    for tp in too_many:
        console.print(f"tp {tp}: left out, it needs more than the {limit} GPUs of this machine")
    total = len(sweep.grid)
    with progress_bars(console) as progress:
        bars = {
            tp: progress.add_task(f"tp {tp}: {total} shapes", total=total, start=False)
            for tp in tps
            if tp not in too_many
        }

        shown: dict[int, int] = {}

        def report(tp: int, left: int) -> None:
            then = "" if left or options.quick else ", again those that stick out"
            progress.start_task(bars[tp])
            progress.update(
                bars[tp], completed=total - left, description=f"tp {tp}: {total} shapes{then}"
            )
            if not console.is_terminal and shown.get(tp) != left:  # no bar is drawn: say it
                console.print(f"tp {tp}: {total - left} of {total} shapes{then}")
            shown[tp] = left

        files = sweep_time(sweep, files, report, lambda tp: tp not in too_many)
        for tp, bar in bars.items():
            progress.update(bar, description=f"tp {tp}: {total} shapes")
    console.print(f"{len(files[0].done)} rows in {layer_path}, embedding and head in {head_path}")
    for key in sorted(files[0].skipped, key=str):
        console.print(f"tp {key[0]}: {key[2]} x {key[1]} ran out of memory and was left out")
    counts = [
        n for n in sorted({*tps, options.load_ranks}) if n > 1 and (limit is None or n <= limit)
    ]
    if counts and not options.single_device:
        from lobra.profiler.collective_time import open_collectives, sweep_collectives

        file = open_collectives(
            shape, collectives_path, precision, device, options.restart, environment, options.quick
        )
        file = sweep_collectives(file, counts, device)
        console.print(f"{len(file.done)} rows of collectives in {collectives_path}")
    return 0


def _estimate(options: TimeOptions) -> int:
    from lobra.profiler.accelerators import load_tables
    from lobra.profiler.calibration import calibrate, layer_error
    from lobra.profiler.estimate_time import base_ms, head_ms, layer_ms
    from lobra.profiler.grid import time_grid
    from lobra.profiler.settings import model_settings

    tps = _tp_list(options.tp)
    precision = options.precision or "bf16"
    shape, tasks = base_and_tasks(options, precision, None, options.trainer_config)
    problems = [problem for tp in tps if (problem := layout_problem(shape, tp, 1))]
    if problems:
        raise ConfigError(problems)
    tables = load_tables(options.accelerators)
    work = _workload(options, tables, shape, tasks, precision)
    efficiency = work.accelerator.efficiency
    console = make_console()
    if options.calibrate is not None:
        measured = load_time_profile(options.calibrate)
        kept = replace(work, memory="keep")  # as the rows are
        efficiency = calibrate(kept, efficiency, measured)
        console.print(
            f"calibrated on the rows of tp 1: matmul {efficiency.matmul:.2f}, attention "
            f"{efficiency.attention:.2f}, start {efficiency.start_ms:.2f} ms"
            f"{' while the device works' if efficiency.starts_ahead else ''}; mean error that "
            f"remains {100 * layer_error(kept, efficiency, measured):.1f} %"
        )
    length = _length(options, "cuda")
    settings = {
        **model_settings(shape),
        "lora_rank": work.lora_rank,
        "precision": precision,
        "accelerator": work.accelerator.figures,
        "efficiency": vars(efficiency),
        "sequence_parallel": work.sequence_parallel,
        "keeps_elementwise": work.keeps_elementwise,
    }
    layer_path, head_path, _ = _paths(options)
    ends = {"what": "embedding and head with loss, forward + backward, ms"}
    layer = {"what": "one layer, forward + backward, ms"}
    if work.dropout_modules:
        layer["dropout"] = ",".join(work.dropout_modules)
    for path, columns, times_of, what, memory in (
        (layer_path, TIME_COLUMNS, (layer_ms,), layer, work.memory),
        (
            head_path,
            HEAD_COLUMNS,
            (base_ms, head_ms),
            ends | {"label_share": PROFILED_SHARE},
            DEFAULT_POLICY,
        ),
    ):
        file = open_sweep(
            path,
            columns,
            3,
            settings | what,
            kind="estimated",
            restart=options.restart,
            environment={},
            memory=memory,
        )
        for size in tps:
            for b, s in time_grid(length, options.max_tokens or length):
                if (size, s, b) not in file.done:
                    times = (round(float(f(work, efficiency, size, b, s)), 6) for f in times_of)
                    file.add((size, s, b, *times), {})
        console.print(f"{len(file.done)} rows, estimated for {work.accelerator.name}, in {path}")
    return 0


def _single_devices(
    options: TimeOptions,
    shape: ModelShape,
    tasks: tuple[TaskConfig, ...],
    precision: str,
    device: str,
    tps: tuple[int, ...],
) -> tuple[SingleDevice, ...]:
    """Return what the collectives of each tp would cost, if shards are to be timed alone."""
    if not options.single_device:
        return ()
    from lobra.profiler.accelerators import load_tables
    from lobra.profiler.estimate_time import all_reduce_ms, all_reduces
    from lobra.profiler.layer_memory import element_bytes
    from lobra.profiler.layer_time_rank import SingleDevice

    per_layer = all_reduces(options.memory)
    if options.links is not None:
        links = load_collectives(options.links)
        if max(tps) > 1 and not links.has(ALL_REDUCE):
            raise ConfigError(f"{options.links}: has no rows of all_reduce; measure with tp 2")
        bytes_per_token = element_bytes(precision) * shape.hidden_size

        def layer_ms(tp: int, tokens: int) -> float:
            return per_layer * float(links.all_reduce_ms(tp, tokens * bytes_per_token))

    elif device == "cpu" or options.accelerator is None:
        raise ConfigError(
            "--single-device needs --accelerator NAME, the GPU whose links are modelled, or "
            "--links CSV, measured ones (on a CPU always these)"
        )
    else:
        tables = load_tables(options.accelerators)
        work = replace(_workload(options, tables, shape, tasks, precision), sequence_parallel=False)

        def layer_ms(tp: int, tokens: int) -> float:
            return float(all_reduce_ms(work, work.accelerator.efficiency, tp, 1, tokens))

    found = []
    for tp in tps:
        fixed_ms, one_ms = layer_ms(tp, 0), layer_ms(tp, 1)
        layer = fixed_ms, one_ms - fixed_ms
        # Embedding and head have two all-reduces: the embedding's and the head's input.
        head = 2 * layer[0] / per_layer, 2 * layer[1] / per_layer
        found.append(SingleDevice(tp, layer, head))
    return tuple(found)


def _links(options: TimeOptions) -> str:
    """Return what must agree for collectives modelled with --single-device to be comparable."""
    if not options.single_device:
        return ""
    if options.links is not None:
        return f"measured, SHA-256 {hashlib.sha256(options.links.read_bytes()).hexdigest()[:16]}"
    from lobra.profiler.accelerators import load_tables

    assert options.accelerator is not None, "refused where the links are asked for"
    return str(load_tables(options.accelerators).accelerator(options.accelerator))


def _workload(
    options: TimeOptions,
    tables: Tables,
    shape: ModelShape,
    tasks: tuple[TaskConfig, ...],
    precision: str,
) -> Workload:
    from lobra.profiler.estimate_memory import Adapters
    from lobra.profiler.estimate_time import Workload

    assert options.accelerator is not None, "see profiler_problems"
    runtime = tables.runtime(options.runtime)
    return Workload(
        shape,
        tables.accelerator(options.accelerator),
        precision,
        options.lora_rank or max((task.largest_rank for task in tasks), default=LORA_RANK),
        memory=options.memory,
        sequence_parallel=runtime.sequence_parallel,
        keeps_elementwise=runtime.keeps_elementwise,
        dropout_modules=Adapters.of_tasks(tasks, shape).dropout_modules,
    )


def _paths(options: TimeOptions) -> tuple[Path, Path, Path]:
    """Return the CSVs of layers, of embedding and head, and of collectives."""
    name = profiled_name(options.model, options.base_precision)
    layers = options.output or default_time_path(name)
    ends = paths_beside(options.model, layers)
    return layers, options.head_output or ends[0], options.collectives_output or ends[1]


def _output_problems(options: TimeOptions) -> list[str]:
    """Return which two of the three profiles would overwrite each other or share a sidecar."""
    names = ("--output", "--head-output", "--collectives-output")
    paths = dict(zip(names, _paths(options), strict=True))
    return [
        f"{one} {paths[one]} and {other} {paths[other]}: one file for two profiles"
        for one, other in combinations(names, 2)
        if meta_path(paths[one]).resolve() == meta_path(paths[other]).resolve()
    ]


def _length(options: TimeOptions, device: str) -> int:
    return options.max_seq_length or DEFAULT_MAX_SEQ_LENGTH[device]


def _tp_list(text: str) -> tuple[int, ...]:
    try:
        tps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        tps = ()
    if not tps or tps[0] < 1:
        raise ConfigError(f"--tp {text!r}: positive numbers separated by commas, such as 1,2,4")
    return tps
