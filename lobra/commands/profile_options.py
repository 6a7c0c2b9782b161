"""What the profilers' command lines share: options, their checks, the console."""

# No postponed annotations here: subclasses in other modules could not resolve them.

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lobra.common.errors import ConfigError, Problems
from lobra.common.options import Device, ModelName, option_problems
from lobra.layout.base_precision import BasePrecision, library_problem, option_problem
from lobra.layout.memory_policy import MemoryPolicy
from lobra.layout.shapes import ModelShape, resolve_shape
from lobra.model.adapter_checks import task_file_problems
from lobra.tasks.config import TaskConfig
from lobra.tasks.task_file import load_trainer_config
from lobra.trainer.host_file import read_host_file

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Options that one way of making a profile knows, the first two also `--single-device`.
OF_ESTIMATING = ("accelerator", "accelerators", "runtime", "calibrate")
OF_MEASURING = ("quick", "load_ranks", "single_device", "links", "collectives_output")
# Of a GPU's memory, what training may plan with: the rest is the context and fragmentation.
CUDA_MEMORY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class ProfilerOptions:
    """What both profilers are told.

    Parameters
    ----------
    precision
        By default fp32 on CPU, bf16 on GPU.
    output
        The CSV; by default one under exp_result/profile.
    restart
        What to do with rows of before: continue after them (never; refused if the settings differ),
        set them aside if the settings differ (changed) or anyway (always).
    host_file
        Naming this host only (taken for the scripts' sake: ranks run on this machine).
    estimate
        Estimate from the model's shapes, without running anything.
    accelerator
        To estimate for, such as A100-40GB; see profiler/accelerators.yaml.
    accelerators
        A file of your own accelerators.
    runtime
        How activations are kept in an estimate: deepspeed (this project; the default)
        or hetu (LobRA's).
    """

    model: ModelName
    device: Device = "auto"
    precision: Literal["fp32", "bf16"] | None = None
    base_precision: BasePrecision | None = None
    output: Path | None = None
    restart: Literal["never", "changed", "always"] = "never"
    memory: MemoryPolicy = "keep"
    host_file: Path | None = None
    estimate: bool = False
    accelerator: str | None = None
    accelerators: Path | None = None
    runtime: str | None = None


def profiler_problems(options: ProfilerOptions) -> Problems:
    """Return what is out of bounds, and what of measuring and estimating does not go together."""
    problems = option_problems(options)
    problems += _estimate_problems(options)
    return problems


def _estimate_problems(options: ProfilerOptions) -> list[str]:
    given = {name for name, value in vars(options).items() if value not in (None, False, 0)}
    problems = []
    if options.estimate:
        if "accelerator" not in given:
            problems.append("--estimate needs --accelerator NAME, such as --accelerator A100-40GB")
        problems += [
            f"{_option(name)} is of measuring: leave it out with --estimate"
            for name in OF_MEASURING
            if name in given
        ]
        return problems
    unused: tuple[str, ...] = OF_ESTIMATING
    more = "give --estimate too"
    if "single_device" in given:
        unused, more = OF_ESTIMATING[2:], "--single-device does not use it"
        if "links" in given:
            problems += [
                f"{_option(name)} tells the links, and so does --links: give one of the two"
                for name in OF_ESTIMATING[:2]
                if name in given
            ]
    elif "links" in given:
        problems.append("--links belongs to --single-device: give that too")
    problems += [f"{_option(name)} is of estimating: {more}" for name in unused if name in given]
    return problems


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def precision_of(precision: str | None, device: str) -> str:
    """Return the precision asked for, or the device's usual one."""
    return precision or ("bf16" if device == "cuda" else "fp32")


def base_shape(options: ProfilerOptions, precision: str, device: str | None) -> ModelShape:
    """Return the base's shape, its linears kept as the options say.

    ``device`` is what computes with it; None: it is estimated.

    Raises
    ------
    ConfigError
        If the model is unknown, or is not to be had so.
    """
    shape = resolve_shape(options.model).kept_in(options.base_precision)
    problems = [option_problem(options.base_precision, precision)]
    if device is not None:
        from lobra.profiler.hardware import product_problem

        problems += [library_problem(shape.quantised), product_problem(shape.quantised, device)]
    Problems(filter(None, problems)).raise_if_any()
    return shape


def base_and_tasks(
    options: ProfilerOptions,
    precision: str,
    device: str | None,
    task_file: str | None,
    num_tasks: int | None = None,
) -> tuple[ModelShape, tuple[TaskConfig, ...]]:
    """Return the base's shape and the tasks of a task file, none without one.

    Raises
    ------
    ConfigError
        With every mistake of both, and of the accelerator that is named; and with what the model
        cannot have of the tasks' adapters.
    """
    problems, shape, config = Problems(), None, None
    with problems.noted():
        shape = base_shape(options, precision, device)
    with problems.noted():
        config = None if task_file is None else load_trainer_config(task_file, num_tasks)
    if options.accelerator is not None:
        from lobra.profiler.accelerators import load_tables

        with problems.noted():
            tables = load_tables(options.accelerators)
            tables.accelerator(options.accelerator)
            tables.runtime(options.runtime)
    if shape is not None and config is not None:
        problems += task_file_problems(config, shape)
    problems.raise_if_any()
    assert shape is not None
    return shape, () if config is None else config.tasks


def environment_of(device: str) -> dict[str, Any]:
    """Return what the sidecar records of this machine, other work on its CPU included."""
    from lobra.profiler.hardware import describe_device, versions

    load = {"load": round(os.getloadavg()[0], 1)} if device == "cpu" else {}
    return {"hardware": describe_device(device), "versions": versions(), **load}


def check_one_machine(host_file: Path | None, environment: Mapping[str, str]) -> None:
    """Refuse several hosts and launchers: the profilers start their ranks themselves, on this one.

    Raises
    ------
    ConfigError
        If the host file is not readable or names several hosts, or ``environment`` says that a
        launcher (torchrun, deepspeed, srun) started this process as one of several.
    """
    started = environment.get("WORLD_SIZE", "1")
    if started.strip() not in ("", "0", "1"):
        raise ConfigError(
            f"WORLD_SIZE is {started}: a launcher started this profiler several times, and all "
            f"would write the same files. It starts its ranks itself, each trial in processes of "
            f"its own: run it once, without torchrun or deepspeed"
        )
    if host_file is None:
        return
    hosts = read_host_file(host_file)
    if len(hosts) > 1:
        raise ConfigError(
            f"host file {host_file}: names {len(hosts)} hosts; the profilers measure on one "
            f"machine. Run them on one of the hosts without a host file: that measures every "
            f"layout within a node. A tp over several nodes: `lobra profile time --single-device "
            f"--accelerator NAME` (one GPU, links modelled) or --estimate; its pp needs none, "
            f"stages cost what they cost within a node plus the transfers"
        )


def make_console(error_stream: bool = True) -> "Console":
    """Return the console for messages (standard error) or for results (standard output)."""
    from rich.console import Console

    return Console(stderr=error_stream, highlight=False, soft_wrap=error_stream)


@contextmanager
def progress_bars(console: "Console") -> Iterator["Progress"]:
    """Show progress bars with the time left."""
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
