"""What-if: options of `lobra plan` that plan for other hardware as well, and what they print."""

# No postponed annotations here: subclasses in other modules could not resolve them.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from lobra.commands.output import write_problem
from lobra.commands.planning import PlanningOptions, lengths_for, read_inputs, read_tasks
from lobra.commands.profile_options import CUDA_MEMORY_SHARE
from lobra.common.errors import Problems
from lobra.common.options import as_options
from lobra.planner.sweep import MATTERS, Hardware, Sizing, parse_range
from lobra.planner.workload import Workload, read_workload
from lobra.profiler import lookup
from lobra.profiler.accelerators import Accelerator, Tables, load_tables
from lobra.profiler.cost_model import TokenShares
from lobra.profiler.estimate import estimate
from lobra.profiler.profiles import adapter_elements_of
from lobra.report.sweep_plot import plot_problem
from lobra.tasks.config import TaskConfig


@as_options
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What else is planned for; every combination of what is given.

    Parameters
    ----------
    sweep_gpus
        Plan for other numbers of GPUs as well.
    sweep_accelerator
        Plan for these accelerators as well, such as H100,H200,A100-80GB (estimates; without a
        profile the plan itself is for the first of them).
    accelerators
        A file of your own accelerators, see profiler/accelerators.yaml.
    sweep_context
        Plan for sequences cut to these numbers of tokens as well, such as 4096,8192.
    price_per_gpu_hour
        2.5, or by accelerator, H100=2.5,A100=1.6: tells what a million tokens cost.
    plot
        Draw the sweep (.png, .pdf or .svg).
    """

    sweep_gpus: Annotated[str | None, Parameter(metavar="LOW:HIGH[:STEP]")] = None
    sweep_accelerator: Annotated[str | None, Parameter(metavar="NAME,...")] = None
    accelerators: Path | None = None
    sweep_context: Annotated[str | None, Parameter(metavar="TOKENS,...")] = None
    price_per_gpu_hour: Annotated[str | None, Parameter(metavar="PRICE")] = None
    plot: Annotated[str | None, Parameter(metavar="FILE")] = None


NO_SWEEP = SweepOptions()
STOPPED = "*"  # marks rows of the table whose search the time limit stopped
PRICE, SAME = "cost / M", "homogeneous s"  # columns of it


@dataclass(frozen=True)
class Sweeps:
    """What a sweep's options say; `prices` are by the beginning of an accelerator's name."""

    gpus: tuple[int, ...]
    contexts: tuple[int | None, ...] = (None,)
    accelerators: tuple[Accelerator, ...] = ()
    tables: Tables | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    is_asked: bool = False

    def price_of(self, name: str) -> float | None:
        """Return the price of a GPU for an hour, None where it is not known."""
        begun = [one for one in self.prices if name.lower().startswith(one.lower())]
        return self.prices[max(begun, key=len)] if begun else None


def sweeps_of(sweep: SweepOptions, options: PlanningOptions, num_gpus: int) -> Sweeps:
    """Return what is to be swept.

    Raises
    ------
    ConfigError
        With every mistake of the options.
    """
    problems = Problems()
    gpus: Sequence[int] = [num_gpus]
    names = _parts(sweep.sweep_accelerator)
    tables: Tables | None = None
    accelerators: tuple[Accelerator, ...] = ()
    prices: dict[str, float] = {}
    with problems.noted():
        gpus = parse_range(sweep.sweep_gpus) if sweep.sweep_gpus else gpus
    with problems.noted():
        tables, accelerators = _accelerators(names, sweep.accelerators)
    with problems.noted():
        prices = _prices(_parts(sweep.price_per_gpu_hour), accelerators)
    contexts: list[int | None] = []
    for text in _parts(sweep.sweep_context):
        limit = int(text) if text.isdecimal() else 0
        if not 0 < limit <= options.max_seq_length:
            problems.add(
                f"--sweep-context: {text!r}; numbers of tokens up to --max-seq-length, "
                f"{options.max_seq_length}, such as 4096,8192, are expected"
            )
        contexts.append(limit)
    is_asked = any((sweep.sweep_gpus, names, contexts, prices))
    if sweep.accelerators and not names:
        problems.add("--accelerators belongs to --sweep-accelerator: give that too")
    if sweep.plot:
        problems += filter(None, [plot_problem(sweep.plot) or write_problem("--plot", sweep.plot)])
        if not any((sweep.sweep_gpus, names, contexts)):
            problems.add(
                "--plot: there is nothing to draw without --sweep-gpus, --sweep-accelerator or "
                "--sweep-context"
            )
    problems.raise_if_any()
    return Sweeps(tuple(gpus), tuple(contexts) or (None,), accelerators, tables, prices, is_asked)


def _parts(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _accelerators(
    names: Sequence[str], path: Path | None
) -> tuple[Tables, tuple[Accelerator, ...]]:
    """Return what is known of accelerators, and those of these names."""
    tables, problems, found = load_tables(path), Problems(), []
    for name in names:
        with problems.noted():
            found.append(tables.accelerator(name))
    problems.raise_if_any()
    return tables, tuple(found)


def _prices(parts: Sequence[str], accelerators: Sequence[Accelerator]) -> dict[str, float]:
    """Return prices by the beginning of a name, "" of any, as they are written."""
    prices, problems = {}, Problems()
    names = [accelerator.name for accelerator in accelerators]
    for part in parts:
        name, _, text = part.rpartition("=")
        try:
            price = float(text)
        except ValueError:
            price = 0.0
        if not 0.0 < price < float("inf"):
            problems.add(f"--price-per-gpu-hour: {part!r}; write 2.5, or H100=2.5,A100=1.6")
        elif name and not any(known.lower().startswith(name.lower()) for known in names):
            swept = ", ".join(names) or "none, see --sweep-accelerator"
            problems.add(f"--price-per-gpu-hour: {name!r} is not swept; swept are {swept}")
        prices[name] = price
    problems.raise_if_any()
    return prices


def read_hardware(
    sweeps: Sweeps, options: PlanningOptions, num_gpus: int, problems: Problems
) -> tuple[Workload, Hardware, list[Hardware], tuple[str, ...]]:
    """Return the workload, what is planned with, what is swept, and what to know of it.

    Planned with are the profiles; without a time profile, the first accelerator swept.

    Raises
    ------
    ConfigError
        If a file is missing or has mistakes, or there are other ``problems``: all at once.
    """
    own_times = lookup.time_path(options.model, options.base_precision)
    if not sweeps.accelerators or options.time_profile or own_times.is_file():
        inputs = read_inputs(options, problems)
        assert inputs.memory
        own = Hardware("", inputs.cost_model, inputs.memory, sweeps.price_of(""))
        shares = inputs.cost_model.shares
        swept = estimates(sweeps, options, num_gpus, inputs.tasks, shares)
        return inputs.workload, own, swept or [own], inputs.notes
    config, _ = read_tasks(options, problems)
    problems.raise_if_any()
    assert config is not None
    lengths, made_up = lengths_for(config, options)
    workload, shares = read_workload(
        config, options.model, lengths, options.data_dir, options.max_seq_length, options.seed
    )
    swept = estimates(sweeps, options, num_gpus, config.tasks, shares)
    note = f"{options.model} has no time profile: the plan is for {swept[0].name}, ESTIMATED"
    return workload, swept[0], swept, (note, *filter(None, [made_up]))


def estimates(
    sweeps: Sweeps,
    options: PlanningOptions,
    num_gpus: int,
    tasks: Sequence[TaskConfig],
    shares: TokenShares,
) -> list[Hardware]:
    """Return what training the tasks costs on each swept accelerator.

    Raises
    ------
    ConfigError
        If the model is unknown.
    """
    shape = options.shape
    adapters = [(task.largest_rank, task.target_modules) for task in tasks]
    elements = adapter_elements_of(options.model, adapters)
    found = []
    for accelerator in sweeps.accelerators:
        assert sweeps.tables
        own = estimate(
            shape,
            accelerator,
            sweeps.tables,
            tasks,
            num_gpus=max(num_gpus, *sweeps.gpus),
            gpus_per_node=options.gpus_per_node,
            max_seq_length=options.max_seq_length,
            memory_share=CUDA_MEMORY_SHARE,
            kind=options.cost_model,
        )
        cost_model = own.cost_model.for_training(shares, elements)
        price = sweeps.price_of(accelerator.name)
        found.append(Hardware(accelerator.name, cost_model, own.memory, price))
    return found


def show_sweep(console: Console, sizings: Sequence[Sizing]) -> None:
    """Print what other hardware would give, with the columns in which something differs."""
    rows = [_cells(sizing) for sizing in sizings]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    if PRICE in columns and SAME in columns:
        columns.remove(SAME)  # there is no room for both
    table = Table(title="what if", box=None, header_style="underline")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for sizing, row in zip(sizings, rows, strict=True):
        plan = "none, see below" if sizing.deployment is None else str(sizing.deployment.plan)
        mark = f" {STOPPED}" if sizing.is_stopped else ""
        table.add_row(*(row[name] or "-" for name in columns), plan + mark)
    console.print(table)
    if any(sizing.is_stopped for sizing in sizings):
        console.print(
            f"{STOPPED} stopped before the search was complete, and more than "
            f"{100 * MATTERS:.0f} % from the bound; --time-limit gives each row more"
        )
    for sizing in sizings:
        if sizing.deployment is None:
            console.print(f"{words_of(sizing)}: {sizing.reason}")
    if any(sizing.accelerator for sizing in sizings):
        console.print(
            "note: accelerators are ESTIMATES from data sheets (profiler/accelerators.yaml), "
            "not measured"
        )


def _cells(sizing: Sizing) -> dict[str, str]:
    """Return what the table says of a sizing, by column; empty: nothing to say."""
    found, cost = sizing.deployment, sizing.cost_per_million_tokens
    mean = None if found is None else found.sampled
    same = None
    if found is not None and found.homogeneous is not None:
        same = found.with_sync(found.homogeneous)
    return {
        "accelerator": sizing.accelerator,
        "context": "" if sizing.context is None else str(sizing.context),
        "cut %": "" if sizing.context is None else f"{100 * sizing.cut_share:.1f}",
        "GPUs": str(sizing.num_gpus),
        "step s": "" if mean is None else f"{mean.mean_step_time_s:.3f}",
        "gap %": "" if mean is None else f"{100 * mean.gap:.2f}",
        "GPU-s": "" if mean is None else f"{mean.mean_gpu_seconds:.1f}",
        PRICE: "" if cost is None else f"{cost:.4g}",
        SAME: "" if same is None else f"{same.step_time_s:.3f}",
    }


def words_of(sizing: Sizing) -> str:
    """Return what was planned for in words."""
    limit = "" if sizing.context is None else f", {sizing.context} tokens"
    return f"{sizing.num_gpus} GPUs{sizing.accelerator and ' ' + sizing.accelerator}{limit}"
