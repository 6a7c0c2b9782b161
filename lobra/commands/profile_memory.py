"""`lobra profile memory`: how many tokens a micro-batch may hold under each layout."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lobra.cli import resumable
from lobra.commands.profile_options import (
    CUDA_MEMORY_SHARE,
    ProfilerOptions,
    base_and_tasks,
    check_one_machine,
    environment_of,
    make_console,
    precision_of,
    profiler_problems,
    progress_bars,
)
from lobra.common.options import NumGpus, NumTasks, NumTokens, TaskSetName, as_options
from lobra.common.words import counted
from lobra.model.folder import resolve_folder
from lobra.profiler.lookup import profiled_name
from lobra.profiler.profiles import MEMORY_COLUMNS, default_memory_path, load_memory_profile
from lobra.profiler.sweep_file import open_sweep


@as_options
@dataclass(frozen=True, kw_only=True)
class MemoryOptions(ProfilerOptions):
    """What the memory profiler is told.

    Parameters
    ----------
    num_gpus
        Most ranks of a layout.
    max_seq_length
        The longest sequence, in tokens, rounded up to a multiple of 256.
    memory_budget
        Of one rank, such as 600MB; by default this machine's free memory / num-gpus on a CPU, 90 %
        of the memory on a GPU (a file that is continued keeps its own).
    """

    trainer_config: TaskSetName
    num_gpus: NumGpus
    num_tasks: NumTasks = None
    max_seq_length: NumTokens = 16384
    memory_budget: Annotated[str | None, Parameter(metavar="SIZE")] = None


def profile_memory(*, options: MemoryOptions) -> int:
    """Find for every layout <tp,pp> of at most --num-gpus ranks how much a micro-batch may hold.

    In steps of 256 tokens. Every trial trains in processes of its own, so running out of memory
    ends the trial only. After a crash or Ctrl-C the same command goes on where it was.

      lobra profile memory --model tiny --num-gpus 4 --trainer-config quickstart \\
          --memory-budget 84MB
      lobra profile memory --model 70B --num-gpus 64 --trainer-config exp_task12 --estimate \\
          --accelerator A800-80GB

    Writes exp_result/profile/memory/max_tokens_MODEL_Ntasks.csv and its .meta.json.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    profiler_problems(options).raise_if_any()
    with resumable():
        return _estimate(options) if options.estimate else _measure(options)


def _measure(options: MemoryOptions) -> int:
    from lobra.profiler.hardware import num_devices, resolve_device
    from lobra.profiler.memory import (
        LayoutResult,
        MemorySweep,
        layouts_within,
        sweep_memory,
        whole_steps,
    )

    check_one_machine(options.host_file, os.environ)
    device = resolve_device(options.device)
    precision = precision_of(options.precision, device)
    shape, tasks = base_and_tasks(
        options, precision, device, options.trainer_config, options.num_tasks
    )
    limit = num_devices(device)
    layouts = layouts_within(shape, options.num_gpus)
    here = tuple((tp, pp) for tp, pp in layouts if limit is None or tp * pp <= limit)
    sweep = MemorySweep(
        folder=resolve_folder(options.model),
        shape=shape,
        tasks=tasks,
        layouts=here,
        max_seq_length=whole_steps(options.max_seq_length),
        budget_bytes=_budget_bytes(options.memory_budget, device, options.num_gpus),
        precision=precision,
        device=device,
        memory=options.memory,
    )
    path = options.output or _default_path(options, len(tasks))
    settings = sweep.settings()
    if options.memory_budget is None:
        # What is free differs a little from run to run: that is not another experiment.
        settings["memory_budget_bytes"] = "default"
    file = open_sweep(
        path,
        MEMORY_COLUMNS,
        3,
        settings,
        kind="measured",
        restart=options.restart,
        environment=environment_of(device) | {"memory_budget_bytes": sweep.budget_bytes},
        memory=options.memory,
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
                trials = counted(len(result.trials), "trial")
                progress.console.print(f"{name}: {result.max_tokens} tokens ({trials})")

        results = sweep_memory(sweep, file, report)
    console.print(f"{len(file.done)} rows in {path}")
    if file.done:
        load_memory_profile(path)  # says what looks wrong
    return 1 if any(result.max_tokens is None for result in results) else 0


def _estimate(options: MemoryOptions) -> int:
    from lobra.profiler.accelerators import load_tables
    from lobra.profiler.estimate_memory import Adapters, estimate_memory
    from lobra.profiler.memory import STEP_TOKENS, layouts_within, parse_bytes, whole_steps
    from lobra.profiler.settings import adapter_settings, model_settings

    assert options.accelerator is not None, "see profiler_problems"
    precision = options.precision or "bf16"
    shape, tasks = base_and_tasks(
        options, precision, None, options.trainer_config, options.num_tasks
    )
    tables = load_tables(options.accelerators)
    accelerator = tables.accelerator(options.accelerator)
    runtime = tables.runtime(options.runtime)
    adapters = Adapters.of_tasks(tasks, shape)
    largest = whole_steps(options.max_seq_length)
    budget = CUDA_MEMORY_SHARE * accelerator.memory_bytes
    if options.memory_budget is not None:
        budget = parse_bytes(options.memory_budget)
    settings = {
        **model_settings(shape),
        **adapter_settings(tasks),
        "max_seq_length": largest,
        "step_tokens": STEP_TOKENS,
        "memory_budget_bytes": int(budget),
        "precision": precision,
        "accelerator": accelerator.figures,
        "runtime": vars(runtime),
    }
    path: Path = options.output or _default_path(options, len(tasks))
    file = open_sweep(
        path,
        MEMORY_COLUMNS,
        3,
        settings,
        kind="estimated",
        restart=options.restart,
        environment={},
        memory=options.memory,
    )
    for tp, pp in layouts_within(shape, options.num_gpus):
        estimate = estimate_memory(shape, tp, pp, adapters, precision, runtime, options.memory)
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


def _default_path(options: MemoryOptions, num_tasks: int) -> Path:
    return default_memory_path(profiled_name(options.model, options.base_precision), num_tasks)


def _budget_bytes(text: str | None, device: str, num_gpus: int) -> int:
    from lobra.profiler.hardware import available_memory_bytes, describe_device
    from lobra.profiler.memory import parse_bytes

    if text is not None:
        return parse_bytes(text)
    if device == "cuda":
        return int(CUDA_MEMORY_SHARE * describe_device(device)["memory_bytes"])
    return available_memory_bytes() // num_gpus
