"""Plain tensor parallel, FSDP2 + PEFT, a GPipe-like pipeline and ours, on the same model and data.

Trains one LoRA adapter on random sequences of heavy-tailed lengths, every method from the same
adapter on the same sequences. A row has tokens/s, step time (mean without the first step), the
largest rank's memory and the losses. A step's time is from drawing its sequences to the optimiser's
end. Memory is the peak of the steps on GPUs, what is resident after the backward pass on CPUs.
On CPU ranks it shows that the methods agree and what their overheads are, not what GPUs would do.
The ranks are processes of this machine, a GPU each.
"""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from benchmarks.baselines_ranks import METHODS, Measured, Work
from benchmarks.sides.lengths import ROOT
from experiments.published import parse_plan
from lobra.common.errors import ConfigError
from lobra.common.models import at_least
from lobra.common.options import Int, PositiveInt, Within, as_options, option_problems
from lobra.layout.layout import Layout
from lobra.layout.placement import place
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import read_shape
from lobra.model.folder import resolve_folder
from lobra.model.launch import run_ranks
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.hardware import num_cores
from lobra.profiler.profiles import TimeProfile, load_time_profile
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import task_seed
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.run import PRELOAD, run_local
from tests.trainer.support import dataset_of, make_run

LEARNING_RATE, LORA_RANK = 1e-3, 16
HOURS_S = 4 * 3600.0  # after which a method that hangs is given up
ABOUT = ("model", "device", "steps", "cores", "load", "losses_apart")
COLUMNS = ("method", "ranks", "tokens_per_s", "step_s", "memory_mib", "first_loss", "last_loss")


@dataclass(frozen=True)
class Row:
    """What was measured of a method; memory is of the largest rank.

    Losses are means over target tokens. ``losses`` and ``tokens`` have an entry per step, the
    others leave the first step out.
    """

    method: str
    ranks: int
    tokens_per_s: float
    step_s: float
    memory_mib: float
    losses: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def first_loss(self) -> float:
        """Mean loss of the first step."""
        return self.losses[0]

    @property
    def last_loss(self) -> float:
        """Mean loss of the last step."""
        return self.losses[-1]


def random_dataset(number: int, longest: int, vocab_size: int) -> TokenizedDataset:
    """Return random sequences: most are short, the longest has ``longest`` tokens."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4.2, 0.9, number), 16, longest).astype(np.int64)
    lengths[0] = longest
    return dataset_of(lengths, vocab_size, generator)


def run_baseline(method: str, work: Work, ranks: int) -> Row:
    """Train with a baseline on ``ranks`` ranks of this machine."""
    measured: list[Measured] = run_ranks(
        "benchmarks.baselines_ranks:train",
        ranks,
        {"method": method, "work": work},
        device=work.device,
        timeout_s=HOURS_S,
        environment={"PYTHONPATH": str(ROOT)},
        preload=PRELOAD,
    )
    first = measured[0]
    memory = [max(step) for step in zip(*(one.memory_bytes for one in measured), strict=True)]
    return _row(method, ranks, first.step_time_s, first.tokens, memory, first.losses)


def _row(
    method: str,
    ranks: int,
    step_time_s: Sequence[float],
    tokens: Sequence[int],
    memory_bytes: Sequence[int],
    losses: Sequence[float],
) -> Row:
    seconds = sum(step_time_s[1:])
    return Row(
        method,
        ranks,
        sum(tokens[1:]) / seconds,
        seconds / (len(step_time_s) - 1),
        max(memory_bytes[1:]) / 2**20,
        tuple(losses),
        tuple(tokens),
    )


def task_of(work: Work) -> TaskConfig:
    """Return the task our trainer runs: the same adapter, data and rate as the baselines'."""
    return TaskConfig(
        "task",
        work.rank,
        work.alpha,
        work.targets,
        work.batch_size,
        "random",
        work.max_tokens,
        learning_rate=work.learning_rate,
        max_grad_norm=0.0,
        resume_from=str(work.adapter_folder),
    )


def run_ours(work: Work, plan: Plan, folder: Path, cost_model: CostModel) -> Row:
    """Train with our trainer on a plan, from the same adapter, data and settings."""
    run = make_run(
        folder, work.model_folder, (task_of(work),), [TokenizedDataset.load(work.data_folder)],
        plan, work.steps, world=place(plan, max(8, plan.num_gpus)), cost_model=cost_model,
        precision=work.precision, device=work.device, num_buckets=16,
    )  # fmt: skip
    run_local(run)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return _row(
        f"ours {plan}",
        plan.num_gpus,
        [step["step_time_s"] for step in steps],
        [step["tokens"] for step in steps],
        [step["memory_bytes"] for step in steps],
        [step["tasks"]["task"]["loss"] for step in steps],
    )


def plain_cost_model(num_layers: int, plan: Plan) -> CostModel:
    """Return rough costs: time follows tokens over tp. Only the balance depends on it."""
    tps = sorted({group.layout.tp for group in plan.groups})
    shapes = [(tp, s, b) for tp in tps for s in (32, 64, 128, 256, 512, 1024) for b in (1, 2, 4)]
    tp, s, b = (np.asarray(column) for column in zip(*shapes, strict=True))
    return fit_cost_model(TimeProfile(tp, s, b, 1 + b * s / 100 / tp), num_layers)


def work_of(
    folder: Path, model: str, device: str, steps: int, longest: int, sequences: int = 64
) -> Work:
    """Write the data to ``folder`` and return what every method trains."""
    base = resolve_folder(model)
    random_dataset(sequences, longest, read_shape(base).vocab_size).save(folder / "data")
    work = Work(
        model_folder=base,
        data_folder=folder / "data",
        adapter_folder=folder / "adapter",
        targets=TARGET_MODULES,
        rank=LORA_RANK,
        alpha=LORA_RANK,
        batch_size=sequences // 2,
        steps=steps,
        max_tokens=longest,
        learning_rate=LEARNING_RATE,
        precision="bf16" if device == "cuda" else "fp32",
        device=device,
        seed=0,
    )
    return replace(work, seed=task_seed(task_of(work), 0))


def plan_from(text: str, longest: int) -> Plan:
    """Return a plan whose largest replicas hold ``longest`` tokens, the others their share.

    Raises
    ------
    ConfigError
        If the text is not a plan.
    """
    try:
        parts = parse_plan(text)
    except ValueError as error:
        raise ConfigError(f"--plan: {error}") from error
    if not parts or any(min(part) < 1 for part in parts):
        raise ConfigError(f"--plan: {text!r}; at least one <tp,pp>xN, of positive numbers")
    largest = max(tp * pp for tp, pp, _ in parts)
    return Plan(
        tuple(
            ReplicaGroup(Layout(tp, pp), number, longest * tp * pp // largest)
            for tp, pp, number in parts
        )
    )


@as_options
@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """What is trained, and on what.

    Parameters
    ----------
    ranks
        Processes.
    steps
        Of training; the first is not timed.
    longest
        Tokens of the longest sequence.
    model
        The base model.
    plan
        Of ours.
    device
        What ranks run on.
    time_profile
        For ours; without it, time ~ tokens/tp.
    output
        CSV to write.
    """

    ranks: PositiveInt = 4
    steps: Annotated[Int, Within(at_least(2))] = 6
    longest: Annotated[Int, Within(at_least(16))] = 512
    model: str = "tiny"
    plan: str = "<1,1>x2 <2,1>x1"
    device: Literal["cpu", "cuda"] = "cpu"
    time_profile: Path | None = None
    output: Path | None = None


DEFAULTS = BaselineOptions()


def baselines(*, options: BaselineOptions = DEFAULTS) -> Iterator[dict[str, Any]]:
    """Train one adapter with every method, and check that all train the same.

    Raises
    ------
    ConfigError
        For every mistake of the user's.
    """
    problems = option_problems(options)
    if options.device == "cuda":
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found < options.ranks:
            problems.add(f"--device cuda: {found} GPUs here, --ranks {options.ranks} wanted")
    problems.raise_if_any()
    plan = plan_from(options.plan, options.longest)
    if plan.num_gpus != options.ranks:
        raise ConfigError(
            f"--plan: {options.plan} has {plan.num_gpus} ranks, not --ranks {options.ranks}"
        )
    num_layers = read_shape(resolve_folder(options.model)).num_layers
    cost_model = (
        fit_cost_model(load_time_profile(options.time_profile), num_layers)
        if options.time_profile
        else plain_cost_model(num_layers, plan)
    )
    if options.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    load_at_start = os.getloadavg()[0]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = work_of(Path(name), options.model, options.device, options.steps, options.longest)
        for method in METHODS:
            rows.append(run_baseline(method, work, options.ranks))
            yield _shown(rows[-1])
        rows.append(run_ours(work, plan, Path(name) / "ours", cost_model))
        yield _shown(rows[-1])
    apart = max(
        abs(row.losses[k] / rows[0].losses[k] - 1) for row in rows for k in range(options.steps)
    )
    yield {"same tokens": len({row.tokens for row in rows}) == 1, "losses apart": f"{apart:.1e}"}
    if options.output:
        loads = f"{load_at_start:.1f} before, {os.getloadavg()[0]:.1f} after"
        about = [options.model, options.device, options.steps, num_cores(), loads, f"{apart:.1e}"]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with options.output.open("w", newline="", encoding="utf-8") as file:
            lines = [[*_shown(row).values(), *about] for row in rows]
            csv.writer(file, lineterminator="\n").writerows([[*COLUMNS, *ABOUT], *lines])


def _shown(row: Row) -> dict[str, Any]:
    return {column: getattr(row, column) for column in COLUMNS}
