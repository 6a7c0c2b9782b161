"""`lobra profile time`: milliseconds of one layer, of embedding and head, and of collectives."""

from __future__ import annotations

import argparse
import hashlib
import os
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.commands.memory_options import add_memory_options, memory_problems
from lobra.commands.profile_options import (
    add_common,
    at_least,
    check_one_machine,
    environment_of,
    estimate_problems,
    make_console,
    precision_of,
    progress_bars,
)
from lobra.common.errors import ConfigError
from lobra.layout.shapes import ModelShape, layout_problem, resolve_shape
from lobra.model.folder import resolve_folder
from lobra.profiler.collectives import ALL_REDUCE, load_collectives
from lobra.profiler.cost_model import paths_beside
from lobra.profiler.head import HEAD_COLUMNS, PROFILED_SHARE
from lobra.profiler.profiles import (
    DEFAULT_POLICY,
    TIME_COLUMNS,
    default_time_path,
    load_time_profile,
)
from lobra.profiler.sidecar import meta_path
from lobra.profiler.sweep_file import open_sweep
from lobra.tasks.config import load_trainer_config

if TYPE_CHECKING:
    from lobra.profiler.accelerators import Tables
    from lobra.profiler.estimate_time import Workload
    from lobra.profiler.layer_time_rank import SingleDevice

NUM_TASKS, LORA_RANK = 4, 16  # where neither they nor a trainer config are given
DEFAULT_MAX_SEQ_LENGTH = {"cpu": 2048, "cuda": 16384}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the time profiler."""
    add_common(parser)
    parser.add_argument("--tp", required=True, help="tensor-parallel sizes, such as 1,2,4")
    parser.add_argument("--max-seq-length", type=int, help="default: 2048 on CPU, 16384 on GPU")
    parser.add_argument("--max-tokens", type=int, help="of a micro-batch; default: max-seq-length")
    parser.add_argument(
        "--load-ranks",
        type=int,
        default=0,
        metavar="N",
        help="time N/tp replicas at once and take the mean: what a machine with fewer cores than "
        "ranks will do in training (default: one replica alone)",
    )
    parser.add_argument(
        "--single-device",
        action="store_true",
        help="time one shard of each tp on one device and model the collectives (give "
        "--accelerator for a GPU's links, or --links)",
    )
    parser.add_argument(
        "--links",
        type=Path,
        metavar="CSV",
        help="with --single-device: all-reduces measured before (a profile of collectives), "
        "instead of those of the accelerator's data sheet",
    )
    parser.add_argument(
        "--num-tasks",
        type=int,
        help=f"adapters (default {NUM_TASKS}; of no consequence for an estimate)",
    )
    parser.add_argument("--lora-rank", type=int, help=f"of each adapter (default {LORA_RANK})")
    parser.add_argument(
        "--trainer-config",
        help="this config's adapters instead (a name or a path); of ranks that differ, an estimate "
        "takes the largest for all",
    )
    add_memory_options(parser, "keep", "rows of each are told apart in the file (default keep)")
    parser.add_argument("--head-output", type=Path, help="the CSV of embedding and head")
    parser.add_argument("--collectives-output", type=Path, help="the CSV of collectives")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="CSV",
        help="with --estimate: fit the efficiencies to the rows of tp 1 of this profile",
    )


def run(args: argparse.Namespace) -> int:
    """Measure or estimate the time profile and what goes with it."""
    problems = estimate_problems(args) + _output_problems(args) + memory_problems(args.memory)
    if args.trainer_config:
        problems += [
            f"{option} and --trainer-config, which says so itself: give one of the two"
            for option, value in (("--num-tasks", args.num_tasks), ("--lora-rank", args.lora_rank))
            if value is not None
        ]
    if problems:
        raise ConfigError(problems)
    at_least("--load-ranks", args.load_ranks, 0)
    if args.num_tasks is None:
        args.num_tasks = NUM_TASKS
    if args.lora_rank is None:
        args.lora_rank = LORA_RANK
        if args.trainer_config and args.estimate:
            tasks = load_trainer_config(args.trainer_config).tasks
            args.lora_rank = max(task.rank for task in tasks)
    at_least("--num-tasks", args.num_tasks, 1)
    at_least("--lora-rank", args.lora_rank, 1)
    return _estimate(args) if args.estimate else _measure(args)


def _measure(args: argparse.Namespace) -> int:
    from lobra.profiler.hardware import num_devices, resolve_device
    from lobra.profiler.layer_time import TimeSweep, open_files, sweep_time

    tps = _tp_list(args.tp)
    check_one_machine(args.host_file, os.environ)
    device = resolve_device(args.device)
    length = _length(args, device)
    shape = resolve_shape(args.model)
    precision = precision_of(args.precision, device)
    sweep = TimeSweep(
        folder=resolve_folder(args.model),
        shape=shape,
        tps=tps,
        max_seq_length=length,
        max_tokens=_max_tokens(args, length),
        load_ranks=args.load_ranks,
        num_tasks=args.num_tasks,
        lora_rank=args.lora_rank,
        precision=precision,
        device=device,
        single_device=_single_devices(args, shape, precision, device, tps),
        tasks=load_trainer_config(args.trainer_config).tasks if args.trainer_config else (),
        links=_links(args),
        memory=args.memory,
    )
    layer_path, head_path, collectives_path = _paths(args)
    environment = environment_of(device)
    files = open_files(sweep, layer_path, head_path, args.restart, environment)
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
            then = "" if left else ", again those that stick out"
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
    counts = [n for n in sorted({*tps, args.load_ranks}) if n > 1 and (limit is None or n <= limit)]
    if counts and not args.single_device:
        from lobra.profiler.collective_time import open_collectives, sweep_collectives

        file = open_collectives(
            shape, collectives_path, precision, device, args.restart, environment
        )
        file = sweep_collectives(file, counts, device)
        console.print(f"{len(file.done)} rows of collectives in {collectives_path}")
    return 0


def _estimate(args: argparse.Namespace) -> int:
    from lobra.profiler.accelerators import load_tables
    from lobra.profiler.estimate_time import base_ms, calibrate, head_ms, layer_error, layer_ms
    from lobra.profiler.grid import time_grid
    from lobra.profiler.settings import shape_settings

    tps = _tp_list(args.tp)
    shape = resolve_shape(args.model)
    problems = [problem for tp in tps if (problem := layout_problem(shape, tp, 1))]
    if problems:
        raise ConfigError(problems)
    tables = load_tables(args.accelerators)
    precision = args.precision or "bf16"
    work = _workload(args, tables, shape, precision)
    efficiency = tables.efficiency
    console = make_console()
    if args.calibrate is not None:
        measured = load_time_profile(args.calibrate)
        kept = replace(work, memory="keep")  # as the rows are
        efficiency = calibrate(kept, efficiency, measured)
        console.print(
            f"calibrated on the rows of tp 1: matmul {efficiency.matmul:.2f}, attention "
            f"{efficiency.attention:.2f}, start {efficiency.start_ms:.2f} ms; mean error that "
            f"remains {100 * layer_error(kept, efficiency, measured):.1f} %"
        )
    length = _length(args, "cuda")
    settings = {
        "model": shape.name,
        "shape": shape_settings(shape),
        "lora_rank": work.lora_rank,
        "precision": precision,
        "accelerator": vars(work.accelerator),
        "efficiency": vars(efficiency),
        "sequence_parallel": work.sequence_parallel,
    }
    layer_path, head_path, _ = _paths(args)
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
            restart=args.restart,
            environment={},
            memory=memory,
        )
        for size in tps:
            for b, s in time_grid(length, _max_tokens(args, length)):
                if (size, s, b) not in file.done:
                    times = (round(float(f(work, efficiency, size, b, s)), 6) for f in times_of)
                    file.add((size, s, b, *times), {})
        console.print(f"{len(file.done)} rows, estimated for {work.accelerator.name}, in {path}")
    return 0


def _single_devices(
    args: argparse.Namespace, shape: ModelShape, precision: str, device: str, tps: tuple[int, ...]
) -> tuple[SingleDevice, ...]:
    """Return what the collectives of each tp would cost, if shards are to be timed alone."""
    if not args.single_device:
        return ()
    from lobra.profiler.accelerators import load_tables
    from lobra.profiler.estimate_memory import element_bytes
    from lobra.profiler.estimate_time import all_reduce_ms, all_reduces
    from lobra.profiler.layer_time_rank import SingleDevice

    per_layer = all_reduces(args.memory)
    if args.links is not None:
        links = load_collectives(args.links)
        if max(tps) > 1 and not links.has(ALL_REDUCE):
            raise ConfigError(f"{args.links}: has no rows of all_reduce; measure with tp 2")
        bytes_per_token = element_bytes(precision) * shape.hidden_size

        def layer_ms(tp: int, tokens: int) -> float:
            return per_layer * float(links.all_reduce_ms(tp, tokens * bytes_per_token))

    elif device == "cpu" or args.accelerator is None:
        raise ConfigError(
            "--single-device needs --accelerator NAME, the GPU whose links are modelled, or "
            "--links CSV, measured ones (on a CPU always these)"
        )
    else:
        tables = load_tables(args.accelerators)
        work = replace(_workload(args, tables, shape, precision), sequence_parallel=False)

        def layer_ms(tp: int, tokens: int) -> float:
            return float(all_reduce_ms(work, tables.efficiency, tp, 1, tokens))

    found = []
    for tp in tps:
        fixed_ms, one_ms = layer_ms(tp, 0), layer_ms(tp, 1)
        layer = fixed_ms, one_ms - fixed_ms
        # Embedding and head have two all-reduces: the embedding's and the head's input.
        head = 2 * layer[0] / per_layer, 2 * layer[1] / per_layer
        found.append(SingleDevice(tp, layer, head))
    return tuple(found)


def _links(args: argparse.Namespace) -> str:
    """Return what must agree for collectives modelled with --single-device to be comparable."""
    if not args.single_device:
        return ""
    if args.links is not None:
        return f"measured, SHA-256 {hashlib.sha256(args.links.read_bytes()).hexdigest()[:16]}"
    from lobra.profiler.accelerators import load_tables

    tables = load_tables(args.accelerators)
    accelerator = tables.accelerator(args.accelerator)
    return f"{accelerator}, {tables.efficiency}"


def _workload(
    args: argparse.Namespace, tables: Tables, shape: ModelShape, precision: str
) -> Workload:
    from lobra.profiler.estimate_time import Workload

    return Workload(
        shape,
        tables.accelerator(args.accelerator),
        precision,
        args.lora_rank,
        sequence_parallel=tables.runtime(args.runtime).sequence_parallel,
        memory=args.memory,
        dropout_modules=_dropout_modules(args, shape),
    )


def _dropout_modules(args: argparse.Namespace, shape: ModelShape) -> tuple[str, ...]:
    from lobra.profiler.estimate_memory import Adapters

    if not args.trainer_config:
        return ()
    tasks = load_trainer_config(args.trainer_config).tasks
    return Adapters.of_tasks(tasks, shape).dropout_modules


def _paths(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Return the CSVs of layers, of embedding and head, and of collectives."""
    layers = args.output or default_time_path(args.model)
    ends = paths_beside(args.model, layers)
    return layers, args.head_output or ends[0], args.collectives_output or ends[1]


def _output_problems(args: argparse.Namespace) -> list[str]:
    """Return which two of the three profiles would overwrite each other or share a sidecar."""
    names = ("--output", "--head-output", "--collectives-output")
    paths = dict(zip(names, _paths(args), strict=True))
    return [
        f"{one} {paths[one]} and {other} {paths[other]}: one file for two profiles"
        for one, other in combinations(names, 2)
        if meta_path(paths[one]).resolve() == meta_path(paths[other]).resolve()
    ]


def _length(args: argparse.Namespace, device: str) -> int:
    if args.max_seq_length is None:
        return DEFAULT_MAX_SEQ_LENGTH[device]
    return at_least("--max-seq-length", args.max_seq_length, 16)


def _max_tokens(args: argparse.Namespace, length: int) -> int:
    return length if args.max_tokens is None else at_least("--max-tokens", args.max_tokens, 16)


def _tp_list(text: str) -> tuple[int, ...]:
    try:
        tps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        tps = ()
    if not tps or tps[0] < 1:
        raise ConfigError(f"--tp {text!r}: positive numbers separated by commas, such as 1,2,4")
    return tps
