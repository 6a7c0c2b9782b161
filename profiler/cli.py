"""`lobra profile time | memory | fit`: measure what layouts cost, and check the cost model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.shapes import TINY, resolve_folder, resolve_shape
from profiler.cost_model import KINDS
from profiler.profiles import (
    MEMORY_COLUMNS,
    default_head_path,
    default_memory_path,
    default_time_path,
    load_memory_profile,
    load_time_profile,
)
from profiler.sweep_file import RESTARTS, open_sweep
from tasks.config import load_trainer_config
from tasks.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PRECISIONS = ("fp32", "bf16")
# Of a GPU's memory, what training may plan with: the rest is the context and fragmentation.
CUDA_MEMORY_SHARE = 0.9
DEFAULT_MAX_SEQ_LENGTH = {"cpu": 2048, "cuda": 16384}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the three profilers as subcommands."""
    commands = parser.add_subparsers(dest="profiler", required=True, metavar="time|memory|fit")
    _add_time(commands.add_parser("time", help="time of one layer per tp and micro-batch shape"))
    _add_memory(commands.add_parser("memory", help="tokens a micro-batch may hold per layout"))
    _add_fit(commands.add_parser("fit", help="the cost model's error on rows it has not seen"))


def run(args: argparse.Namespace) -> int:
    """Run the chosen profiler and return the exit code."""
    code: int = {"time": run_time, "memory": run_memory, "fit": run_fit}[args.profiler](args)
    return code


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="tiny, 7B, ... or a model folder")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", choices=PRECISIONS, help="default: fp32 on CPU, bf16 on GPU")
    parser.add_argument("--output", type=Path, help="the CSV (default: under exp_result/profile)")
    parser.add_argument(
        "--restart",
        default="never",
        choices=RESTARTS,
        help="what to do with rows measured before: continue after them (never; refused if the "
        "settings differ), set them aside if the settings differ (changed) or anyway (always)",
    )
    parser.add_argument("--host-file", help="hosts of the job; measuring uses this machine only")


def _add_time(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
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
    parser.add_argument("--num-tasks", type=int, default=4, help="adapters (default 4)")
    parser.add_argument("--lora-rank", type=int, default=16, help="of each adapter (default 16)")
    parser.add_argument("--head-output", type=Path, help="the CSV of embedding and head")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--num-gpus", type=int, required=True, help="most ranks of a layout")
    parser.add_argument("--num-tasks", type=int, help="adapters; default: all of the config")
    parser.add_argument("--trainer-config", required=True, help="a name or a path")
    parser.add_argument("--max-seq-length", type=int, default=16384, help="tokens (default 16384)")
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="of one rank, such as 600MB (default: this machine's free memory / num-gpus on a "
        "CPU, 90 %% of the memory on a GPU)",
    )


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=TINY, help="whose profile (default tiny)")
    parser.add_argument("--time-profile", type=Path, help="the CSV (default: the model's)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: every kind")
    parser.add_argument("--folds", type=int, default=5, help="of the cross-validation (default 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--worst", type=int, default=5, help="rows predicted worst to list")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run_time(args: argparse.Namespace) -> int:
    """Measure the time profile and the one of embedding and head."""
    from profiler.hardware import num_devices, resolve_device
    from profiler.layer_time import TimeSweep, open_files, sweep_time

    tps = _tp_list(args.tp)
    _check_host_file(args.host_file)
    device = resolve_device(args.device)
    length = args.max_seq_length or DEFAULT_MAX_SEQ_LENGTH[device]
    sweep = TimeSweep(
        folder=resolve_folder(args.model),
        shape=resolve_shape(args.model),
        tps=tps,
        max_seq_length=length,
        max_tokens=args.max_tokens or length,
        load_ranks=_at_least("--load-ranks", args.load_ranks, 0),
        num_tasks=_at_least("--num-tasks", args.num_tasks, 1),
        lora_rank=_at_least("--lora-rank", args.lora_rank, 1),
        precision=_precision(args.precision, device),
        device=device,
    )
    layer_path = args.output or default_time_path(args.model)
    head_path = args.head_output or _head_path(args, layer_path)
    files = open_files(sweep, layer_path, head_path, args.restart, _environment(device))
    console = _console()
    limit = num_devices(device)
    too_many = [tp for tp in tps if limit is not None and sweep.num_replicas(tp) * tp > limit]
    for tp in too_many:
        console.print(f"tp {tp}: left out, it needs more than the {limit} GPUs of this machine")
    total = len(sweep.points)
    with _progress(console) as progress:
        bars = {
            tp: progress.add_task(f"tp {tp}: {total} shapes", total=total)
            for tp in tps
            if tp not in too_many
        }
        files = sweep_time(
            sweep,
            files,
            lambda tp, left: progress.update(bars[tp], completed=total - left),
            lambda tp: tp not in too_many,
        )
    console.print(f"{len(files[0].done)} rows in {layer_path}, embedding and head in {head_path}")
    for tp, s, b in sorted(files[0].skipped):
        console.print(f"tp {tp}: {b} x {s} ran out of memory and was left out")
    return 0


def run_memory(args: argparse.Namespace) -> int:
    """Measure the memory profile."""
    from profiler.hardware import num_devices, resolve_device
    from profiler.memory import LayoutResult, MemorySweep, layouts_within, sweep_memory

    _check_host_file(args.host_file)
    tasks = load_trainer_config(args.trainer_config, args.num_tasks).tasks
    num_gpus = _at_least("--num-gpus", args.num_gpus, 1)
    length = _at_least("--max-seq-length", args.max_seq_length, 256)
    device = resolve_device(args.device)
    shape = resolve_shape(args.model)
    limit = num_devices(device)
    layouts = layouts_within(shape, num_gpus)
    here = tuple((tp, pp) for tp, pp in layouts if limit is None or tp * pp <= limit)
    folder = resolve_folder(args.model)
    sweep = MemorySweep(
        folder=folder,
        shape=shape,
        tasks=tasks,
        layouts=here,
        max_seq_length=length,
        budget_bytes=_budget_bytes(args.memory_budget, device, num_gpus),
        precision=_precision(args.precision, device),
        device=device,
    )
    path = args.output or default_memory_path(args.model, len(tasks))
    settings = sweep.settings()
    if args.memory_budget is None:
        # What is free differs a little from run to run: that is not another experiment.
        settings["memory_budget_bytes"] = "default"
    environment = _environment(device) | {"memory_budget_bytes": sweep.budget_bytes}
    file = open_sweep(
        path,
        MEMORY_COLUMNS,
        3,
        settings,
        kind="measured",
        restart=args.restart,
        environment=environment,
    )
    console = _console()
    if len(here) < len(layouts):
        left_out = ", ".join(f"<{tp},{pp}>" for tp, pp in layouts if (tp, pp) not in here)
        console.print(f"left out, more than the {limit} GPUs of this machine: {left_out}")
    console.print(f"budget of a rank: {sweep.budget_bytes / (1 << 20):.0f} MiB")
    done = sum((tp, pp, 1) in file.done for tp, pp in here)
    with _progress(console) as progress:
        bar = progress.add_task(f"{len(here)} layouts", total=len(here), completed=done)

        def report(result: LayoutResult) -> None:
            progress.advance(bar)
            name = f"<{result.tp},{result.pp}>"
            if result.max_tokens is None:
                progress.console.print(f"{name}: failed: {result.failure.splitlines()[-1]}")
            else:
                trials = len(result.trials)
                progress.console.print(f"{name}: {result.max_tokens} tokens ({trials} trials)")

        results = sweep_memory(sweep, file, report)
    console.print(f"{len(file.done)} rows in {path}")
    if file.done:
        load_memory_profile(path)  # says what looks wrong
    return 1 if any(result.max_tokens is None for result in results) else 0


def run_fit(args: argparse.Namespace) -> int:
    """Print the cost model's errors on held-out rows."""
    from rich.table import Table

    from profiler.validation import cross_validate, worst_rows

    profile = load_time_profile(args.time_profile or default_time_path(args.model))
    kinds = tuple(dict.fromkeys(args.kind or KINDS))
    found = {kind: cross_validate(profile, kind, args.folds, args.seed) for kind in kinds}
    worst = worst_rows(profile, found[kinds[0]], args.worst)
    if args.json:
        errors = {
            kind: {
                str(v.tp): {"rows": len(v.rows), "mean": v.mean_error, "max": v.max_error}
                for v in validations
            }
            for kind, validations in found.items()
        }
        print(json.dumps({"profile": str(profile.path), "folds": args.folds, "error": errors}))
        return 0
    console = _console(error_stream=False)
    table = Table(title=f"{profile.path}: error on held-out rows ({args.folds} folds)")
    for column in ("cost model", "tp", "rows", "mean error", "max error"):
        table.add_column(column, justify="left" if column == "cost model" else "right")
    for kind, validations in found.items():
        for v in validations:
            shares = (f"{100 * v.mean_error:.2f} %", f"{100 * v.max_error:.2f} %")
            table.add_row(kind, str(v.tp), str(len(v.rows)), *shares)
    console.print(table)
    for tp, b, s, time_ms, error in worst:
        console.print(f"tp {tp}, {b} x {s}: {time_ms:.3f} ms, predicted {100 * error:+.1f} %")
    return 0


def _tp_list(text: str) -> tuple[int, ...]:
    try:
        tps = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        tps = ()
    if not tps or tps[0] < 1:
        raise ConfigError(f"--tp {text!r}: positive numbers separated by commas, such as 1,2,4")
    return tps


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{option} {value}: at least {least} is needed")
    return value


def _precision(precision: str | None, device: str) -> str:
    return precision or ("bf16" if device == "cuda" else "fp32")


def _budget_bytes(text: str | None, device: str, num_gpus: int) -> int:
    from profiler.hardware import available_memory_bytes, describe_device
    from profiler.memory import parse_bytes

    if text is not None:
        return parse_bytes(text)
    if device == "cuda":
        return int(CUDA_MEMORY_SHARE * describe_device(device)["memory_bytes"])
    return available_memory_bytes() // num_gpus


def _head_path(args: argparse.Namespace, layer_path: Path) -> Path:
    if args.output is None:
        return default_head_path(args.model)
    return layer_path.with_name(f"head_{layer_path.name}")


def _environment(device: str) -> dict[str, Any]:
    from profiler.hardware import describe_device, versions

    return {"hardware": describe_device(device), "versions": versions()}


def _check_host_file(host_file: str | None) -> None:
    """Refuse a host file that names several hosts: the profilers measure on one machine."""
    if host_file is None:
        return
    try:
        lines = Path(host_file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"host file {host_file}: not readable ({error})") from error
    hosts = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if len(hosts) > 1:
        raise ConfigError(
            f"host file {host_file}: names {len(hosts)} hosts; the profilers measure on one "
            f"machine: run them there without a host file (layouts within one node suffice)"
        )


def _console(error_stream: bool = True) -> Console:
    from rich.console import Console

    return Console(stderr=error_stream, highlight=False, soft_wrap=error_stream)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        yield progress
