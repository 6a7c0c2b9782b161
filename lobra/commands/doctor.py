"""`lobra doctor`: what this machine has and lacks, and what a given plan would need of it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from lobra.cli import INSTALL_TRAIN
from lobra.commands.doctor_hosts import HostNeeds, host_findings
from lobra.commands.finding import LACKS, NOTE, OK, Finding
from lobra.common.errors import ConfigError
from lobra.common.models import NumGpus, refusal
from lobra.common.options import THIS_MACHINE, Int, LauncherOptions, option_problems
from lobra.common.version import NOT_INSTALLED, installed_version
from lobra.layout.placement import place
from lobra.layout.plan import Plan, load_plan
from lobra.layout.shapes import TINY, layout_problem, resolve_shape
from lobra.model.folder import resolve_folder
from lobra.profiler.collectives import ADAPTER_BYTES
from lobra.profiler.hardware import available_memory_bytes, cpu_name, num_cores
from lobra.profiler.lookup import provenance_note, time_path
from lobra.tasks.task_file import TrainerConfig, load_trainer_config
from lobra.trainer.host_file import first_slots, read_host_file

DISTRIBUTION = "lobra"
# When the project runs from a checkout without being installed, what it imports.
ESSENTIAL = ("numpy", "scipy", "pyscipopt", "ortools")
TRAINING = ("torch", "deepspeed", "transformers")
GIB = 1 << 30
# Importing torch, transformers and deepspeed, per rank process; forked ranks share most of it.
RANK_OVERHEAD_BYTES = GIB // 4


def doctor(
    *,
    model: str | None = None,
    strategy_config: str | None = None,
    trainer_config: str | None = None,
    gpus_per_node: Int | None = None,
    output_dir: Path | None = None,
    launcher: LauncherOptions = THIS_MACHINE,
) -> int:
    """Say what this machine has and lacks, and what a plan would need; end 1 if it lacks something.

    With --host-file it asks every host, by ssh: versions, clocks, folders, ports, links.

    Parameters
    ----------
    model
        Check this base model, and the plan against it.
    strategy_config
        Check what this plan needs.
    trainer_config
        The tasks, whose adapters hosts are to exchange.
    gpus_per_node
        By default what the hosts of the host file have, else the GPUs of this machine, or 8.
    output_dir
        Check whether hosts share this run's folder.

    Raises
    ------
    ConfigError
        If an option is out of bounds, or a file cannot be read.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    asked = (model, strategy_config, gpus_per_node, launcher, trainer_config, output_dir)
    findings = list(examine(*asked))
    table = Table(show_header=False)
    colours = {OK: "green", LACKS: "red", NOTE: "yellow"}
    for finding in findings:
        colour = colours[finding.status]
        table.add_row(f"[{colour}]{finding.status}[/]", finding.subject, escape(finding.text))
    Console(highlight=False).print(table)
    return 1 if any(finding.status == LACKS for finding in findings) else 0


def examine(
    model: str | None,
    plan_name: str | None,
    gpus_per_node: int | None,
    launcher: LauncherOptions = THIS_MACHINE,
    trainer_config: str | None = None,
    output_dir: Path | None = None,
) -> Iterator[Finding]:
    """Yield what was found, about the machine first, then about hosts, the model and the plan.

    Raises
    ------
    ConfigError
        If an option is out of bounds, or a file cannot be read.
    """
    problems = option_problems(launcher)
    plan: Plan | None = None
    tasks: TrainerConfig | None = None
    slots: Mapping[str, int] = {}
    if gpus_per_node is not None and (wanted := refusal(NumGpus, gpus_per_node)):
        problems.add(f"--gpus-per-node {gpus_per_node}: want {wanted}")
    with problems.noted():
        plan = load_plan(plan_name) if plan_name else None
    with problems.noted():
        tasks = load_trainer_config(trainer_config) if trainer_config else None
    if launcher.host_file is not None:
        with problems.noted():
            slots = read_host_file(launcher.host_file)
    if launcher.env_file is not None and not os.path.exists(launcher.env_file):
        problems.add(f"--env-file {launcher.env_file}: no such file")
    problems.raise_if_any()
    yield from _packages()
    yield Finding(OK, "CPU", f"{cpu_name()}, {num_cores()} cores")
    memory = available_memory_bytes()
    yield Finding(OK, "memory", f"{memory / GIB:.1f} GiB free")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding(OK if free > 5 * GIB else NOTE, "disk", f"{free / GIB:.1f} GiB free here")
    num_gpus = 0
    for finding, count in _gpus():
        num_gpus += count
        yield finding
    if model:
        yield from _model(model)
    if slots:
        yield from host_findings(slots, launcher, _needs(model, plan, tasks, output_dir))
    if plan is not None:
        nodes: int | tuple[int, ...] = gpus_per_node or num_gpus or 8
        if slots and gpus_per_node is None:
            is_enough = sum(slots.values()) >= plan.num_gpus
            chosen = tuple(first_slots(slots, plan.num_gpus).values())
            nodes = chosen if is_enough else max(chosen)
        yield from _plan(plan, model, nodes)
        if slots:
            yield _slots(plan, slots)
        else:
            yield from _ranks(plan, num_gpus, memory)


def _needs(
    model: str | None, plan: Plan | None, tasks: TrainerConfig | None, output_dir: Path | None
) -> HostNeeds:
    """Return what hosts must have for this; what is not usable of it was reported before."""
    folder = adapter_bytes = None
    with contextlib.suppress(ConfigError):
        shape = resolve_shape(model) if model else None
        if shape and tasks:
            adapter_bytes = ADAPTER_BYTES * sum(
                shape.adapter_elements(task.largest_rank, task.target_modules)
                for task in tasks.tasks
            )
        if shape and (shape.path or model != TINY):
            folder = resolve_folder(str(model))
    return HostNeeds(
        model_folder=folder,
        output_dir=output_dir,
        adapter_bytes=adapter_bytes,
        num_ranks=None if plan is None else plan.num_gpus,
        step_time_s=None if plan is None else plan.meta.get("step_time_s"),
    )


def _packages() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(OK if sys.version_info >= (3, 11) else LACKS, "Python", version)
    try:
        required = importlib.metadata.requires(DISTRIBUTION) or []
        names = [r for r in required if "extra ==" not in r]
        training = [r for r in required if r.endswith(("extra == 'train'", 'extra == "train"'))]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(NOTE, DISTRIBUTION, "not installed; bash scripts/quickstart.sh installs it")
        names, training = list(ESSENTIAL), list(TRAINING)
    missing = []
    for requirement in sorted([*names, *training], key=str.casefold):
        name, wanted = _split_requirement(requirement)
        found = installed_version(name)
        if found == NOT_INSTALLED and requirement in training:
            missing.append(name)
        elif found == NOT_INSTALLED:
            yield Finding(LACKS, name, f"not installed; wanted {wanted or 'any version'}")
        elif _fits(found, wanted):
            yield Finding(OK, name, found)
        else:
            yield Finding(NOTE, name, f"{found}; checked with {wanted}")
    if missing:
        yield Finding(NOTE, ", ".join(missing), f"not installed; {INSTALL_TRAIN}")


def _split_requirement(requirement: str) -> tuple[str, str]:
    """Return ("torch", ">=2.6,<=2.13.0") of "torch<=2.13.0,>=2.6"."""
    text = requirement.partition(";")[0].strip()
    end = next((i for i, c in enumerate(text) if c in "<>=!~ ["), len(text))
    return text[:end], text[end:].strip()


def _fits(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _gpus() -> Iterator[tuple[Finding, int]]:
    """Yield a finding and how many usable GPUs it adds."""
    try:
        import torch
    except ImportError:
        return  # already reported
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield Finding(OK, f"GPU {index}", f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB"), 1
        if importlib.util.find_spec("triton") is None:
            text = "not installed: norms and activations run unfused, as torch cannot compile them"
            yield Finding(NOTE, "triton", text), 0
    elif shutil.which("nvidia-smi") and torch.version.cuda is None:
        text = "nvidia-smi is there, but torch is a CPU build; install a CUDA build of torch"
        yield Finding(LACKS, "GPU", text), 0
    else:
        yield Finding(NOTE, "GPU", "none that torch can use; ranks run as CPU processes"), 0


def _slots(plan: Plan, slots: Mapping[str, int]) -> Finding:
    total = sum(slots.values())
    if total >= plan.num_gpus:
        return Finding(OK, "ranks", f"{plan.num_gpus} of the {total} slots of {len(slots)} hosts")
    text = f"{plan.num_gpus - total} slots are missing: {len(slots)} hosts have {total}"
    return Finding(LACKS, "ranks", text)


def _model(model: str) -> Iterator[Finding]:
    try:
        shape = resolve_shape(model)
    except ConfigError as error:
        yield Finding(LACKS, "model", str(error))
        return
    text = f"{shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} heads"
    yield Finding(OK, "model", f"{model}: {text}")
    if model == TINY and shape.path is None:
        yield Finding(OK, "weights", "built on first use")
    else:
        try:
            yield Finding(OK, "weights", str(resolve_folder(model)))
        except ConfigError as error:
            yield Finding(NOTE, "weights", f"{error} (planning needs none)")
    profile = time_path(model)
    if profile.is_file():
        origin = provenance_note(profile)
        yield Finding(NOTE if origin else OK, "time profile", origin or str(profile))
    else:
        text = f"no {profile}; measure it with lobra profile time"
        yield Finding(NOTE, "time profile", text)


def _plan(plan: Plan, model: str | None, nodes: int | tuple[int, ...]) -> Iterator[Finding]:
    yield Finding(OK, "plan", f"{plan}: {plan.num_gpus} ranks, up to {plan.max_tokens} tokens")
    try:
        place(plan, nodes)
    except ConfigError as error:
        yield Finding(LACKS, "placement", str(error))
    else:
        sizes = nodes if isinstance(nodes, int) else ", ".join(map(str, nodes))
        yield Finding(OK, "placement", f"fits nodes of {sizes} GPUs")
    if model:
        try:
            shape = resolve_shape(model)
        except ConfigError:
            return  # already reported with the model
        layouts = sorted({group.layout for group in plan.groups})
        for layout in layouts:
            problem = layout_problem(shape, layout.tp, layout.pp)
            if problem:
                yield Finding(LACKS, f"layout {layout}", problem)


def _ranks(plan: Plan, num_gpus: int, memory: int) -> Iterator[Finding]:
    if num_gpus >= plan.num_gpus:
        yield Finding(OK, "ranks", f"{plan.num_gpus} of the {num_gpus} GPUs here")
        return
    missing = plan.num_gpus - num_gpus
    text = f"{missing} GPUs are missing on this machine; --host-file adds machines, "
    text += "--device cpu runs the ranks as processes"
    yield Finding(NOTE, "ranks", text)
    needed = plan.num_gpus * RANK_OVERHEAD_BYTES
    if needed > memory:
        text = f"{plan.num_gpus} processes take about {needed / GIB:.1f} GiB before any weights"
        yield Finding(LACKS, "CPU ranks", text)
    elif plan.num_gpus > num_cores():
        text = f"{plan.num_gpus} processes share {num_cores()} cores: profile with --load-ranks"
        yield Finding(NOTE, "CPU ranks", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize < GIB // 16:
        yield Finding(NOTE, "/dev/shm", "less than 64 MiB free; communication may be slow")
