"""`lobra profile memory`: how many tokens a micro-batch may hold under each layout."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from lobra.commands.memory_options import add_memory_options, memory_problems
from lobra.commands.profile_options import (
    CUDA_MEMORY_SHARE,
    add_common,
    at_least,
    check_estimate_options,
    check_one_machine,
    environment_of,
    make_console,
    precision_of,
    progress_bars,
)
from lobra.common.errors import ConfigError
from lobra.layout.shapes import resolve_shape
from lobra.model.folder import resolve_folder
from lobra.profiler.profiles import MEMORY_COLUMNS, default_memory_path, load_memory_profile
from lobra.profiler.sweep_file import open_sweep
from lobra.tasks.config import load_trainer_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the memory profiler."""
    add_common(parser)
    parser.add_argument("--num-gpus", type=int, required=True, help="most ranks of a layout")
    parser.add_argument("--num-tasks", type=int, help="adapters; default: all of the config")
    parser.add_argument("--trainer-config", required=True, help="a name or a path")
    parser.add_argument(
        "--max-seq-length",
        type=int,
        default=16384,
        help="the longest sequence, in tokens, rounded up to a multiple of 256 (default 16384)",
    )
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="of one rank, such as 600MB (default: this machine's free memory / num-gpus on a "
        "CPU, 90 %% of the memory on a GPU; a file that is continued keeps its own)",
    )
    add_memory_options(parser, "keep", "of every layout (default keep)")


def run(args: argparse.Namespace) -> int:
    """Measure or estimate the memory profile."""
    check_estimate_options(args)
    at_least("--num-gpus", args.num_gpus, 1)
    at_least("--max-seq-length", args.max_seq_length, 1)
    if problems := memory_problems(args.memory):
        raise ConfigError(problems)
    return _estimate(args) if args.estimate else _measure(args)


def _measure(args: argparse.Namespace) -> int:
    from lobra.profiler.hardware import num_devices, resolve_device
    from lobra.profiler.memory import (
        LayoutResult,
        MemorySweep,
        layouts_within,
        sweep_memory,
        whole_steps,
    )

    check_one_machine(args.host_file, os.environ)
    tasks = load_trainer_config(args.trainer_config, args.num_tasks).tasks
    device = resolve_device(args.device)
    shape = resolve_shape(args.model)
    limit = num_devices(device)
    layouts = layouts_within(shape, args.num_gpus)
    here = tuple((tp, pp) for tp, pp in layouts if limit is None or tp * pp <= limit)
    sweep = MemorySweep(
        folder=resolve_folder(args.model),
        shape=shape,
        tasks=tasks,
        layouts=here,
        max_seq_length=whole_steps(args.max_seq_length),
        budget_bytes=_budget_bytes(args.memory_budget, device, args.num_gpus),
        precision=precision_of(args.precision, device),
        device=device,
        memory=args.memory,
    )
    path = args.output or default_memory_path(args.model, len(tasks))
    settings = sweep.settings()
    if args.memory_budget is None:
        # What is free differs a little from run to run: that is not another experiment.
        settings["memory_budget_bytes"] = "default"
    file = open_sweep(
        path,
        MEMORY_COLUMNS,
        3,
        settings,
        kind="measured",
        restart=args.restart,
        environment=environment_of(device) | {"memory_budget_bytes": sweep.budget_bytes},
        memory=args.memory,
    )
    console = make_console()
    if len(here) < len(layouts):
        left_out = ", ".join(f"<{tp},{pp}>" for tp, pp in layouts if (tp, pp) not in here)
        console.print(f"left out, more than the {limit} GPUs of this machine: {left_out}")
    environment = file.meta.setdefault("environment", {})
    kept_bytes = environment.setdefault("memory_budget_bytes", sweep.budget_bytes)
    as_before = ", as when this file was begun" if kept_bytes != sweep.budget_bytes else ""
    sweep = replace(sweep, budget_bytes=kept_bytes)  # the same for all rows of a file
    console.print(f"budget of a rank: {kept_bytes / (1 << 20):.0f} MiB{as_before}")
    done = sum((tp, pp, 1) in file.done for tp, pp in here)
    with progress_bars(console) as progress:
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


def _estimate(args: argparse.Namespace) -> int:
    from lobra.profiler.accelerators import load_tables
    from lobra.profiler.estimate_memory import Adapters, estimate_memory
    from lobra.profiler.memory import STEP_TOKENS, layouts_within, parse_bytes, whole_steps
    from lobra.profiler.settings import adapter_settings, shape_settings

    tables = load_tables(args.accelerators)
    accelerator = tables.accelerator(args.accelerator)
    runtime = tables.runtime(args.runtime)
    tasks = load_trainer_config(args.trainer_config, args.num_tasks).tasks
    shape = resolve_shape(args.model)
    adapters = Adapters.of_tasks(tasks, shape)
    precision = args.precision or "bf16"
    largest = whole_steps(args.max_seq_length)
    budget = CUDA_MEMORY_SHARE * accelerator.memory_bytes
    if args.memory_budget is not None:
        budget = parse_bytes(args.memory_budget)
    settings = {
        "model": shape.name,
        "shape": shape_settings(shape),
        **adapter_settings(tasks),
        "max_seq_length": largest,
        "step_tokens": STEP_TOKENS,
        "memory_budget_bytes": int(budget),
        "precision": precision,
        "accelerator": vars(accelerator),
        "runtime": vars(runtime),
    }
    path: Path = args.output or default_memory_path(args.model, len(tasks))
    file = open_sweep(
        path,
        MEMORY_COLUMNS,
        3,
        settings,
        kind="estimated",
        restart=args.restart,
        environment={},
        memory=args.memory,
    )
    for tp, pp in layouts_within(shape, args.num_gpus):
        estimate = estimate_memory(shape, tp, pp, adapters, precision, runtime, args.memory)
        if (tp, pp, 1) not in file.done:
            tokens = estimate.max_tokens(budget, STEP_TOKENS, largest)
            details = {
                "fixed_bytes": int(estimate.fixed_bytes),
                "bytes_per_token": int(estimate.bytes_per_token),
                "parts": estimate.parts(tokens).as_json(),
            }
            file.add((tp, pp, 1, tokens), details)
    console = make_console()
    console.print(f"{len(file.done)} rows, estimated for {accelerator.name}, in {path}")
    load_memory_profile(path)
    return 0


def _budget_bytes(text: str | None, device: str, num_gpus: int) -> int:
    from lobra.profiler.hardware import available_memory_bytes, describe_device
    from lobra.profiler.memory import parse_bytes

    if text is not None:
        return parse_bytes(text)
    if device == "cuda":
        return int(CUDA_MEMORY_SHARE * describe_device(device)["memory_bytes"])
    return available_memory_bytes() // num_gpus
