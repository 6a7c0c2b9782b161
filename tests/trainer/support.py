"""Runs made by hand: random data, a plan from layouts, a cost model with plain costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lobra.layout.layout import Layout
from lobra.layout.placement import place
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import read_shape
from lobra.layout.world import World
from lobra.model.groups import build_groups
from lobra.model.stage import build_stage
from lobra.profiler.cost_model import CostModel, fit_cost_model
from lobra.profiler.profiles import TimeProfile
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.adapters import WEIGHTS_FILE, adapter_spec
from lobra.trainer.metrics import ReplicaMetrics, StepMetrics, TaskMetrics, read_metrics
from lobra.trainer.resume_checks import task_record
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import micro_batch, tensors_of


def plain_cost_model(num_layers: int, tps: tuple[int, ...] = (1, 2, 4, 8)) -> CostModel:
    """Return a cost model fitted to t = 1 + tokens / 200 / tp + tokens * length / 1e5 / tp ms."""
    rows = [(tp, s, b) for tp in tps for s in (16, 64, 128, 256, 512) for b in (1, 2, 4, 8)]
    tp, s, b = (np.asarray(column, dtype=np.int64) for column in zip(*rows, strict=True))
    time_ms = 1.0 + b * s / 200 / tp + b * s * s / 1e5 / tp
    return fit_cost_model(TimeProfile(tp, s, b, time_ms), num_layers)


def small_task(**fields: object) -> TaskConfig:
    """Return a task of one target module, with these fields."""
    values = dict(
        name="t", rank=2, lora_alpha=2.0, target_modules=("q_proj",), global_batch_size=1,
        dataset_name="d", context_length=8, learning_rate=0.3,
    )  # fmt: skip
    return TaskConfig(**{**values, **fields})  # type: ignore[arg-type]


def make_plan(layouts: list[tuple[Any, ...]], max_tokens: int) -> Plan:
    """Return a plan with one replica per (tp, pp) or (tp, pp, memory policy).

    Larger layouts hold more tokens.
    """
    groups = [
        ReplicaGroup(Layout(tp, pp, 1, *memory), 1, max_tokens * tp * pp)
        for tp, pp, *memory in layouts
    ]
    return Plan(tuple(groups))


def dataset_of(lengths: np.ndarray, vocab: int, generator: np.random.Generator) -> TokenizedDataset:
    """Return random sequences of these lengths; all tokens but the first are targets."""
    tokens = generator.integers(3, vocab, int(lengths.sum())).astype(np.int32)
    labels = tokens.copy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels[offsets[:-1]] = -100
    return TokenizedDataset(tokens, labels, offsets)


def random_dataset(
    num: int, shortest: int, longest: int, vocab: int, seed: int
) -> TokenizedDataset:
    """Return random sequences whose first third is prompt (masked)."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, num)
    data = dataset_of(lengths, vocab, generator)
    for start, length in zip(data.offsets[:-1], lengths, strict=True):
        data.labels[start : start + length // 3] = -100
    return data


def make_run(
    folder: Path,
    model_folder: Path,
    tasks: tuple[TaskConfig, ...],
    datasets: list[TokenizedDataset],
    plan: Plan,
    steps: int,
    **changes: object,
) -> RunSpec:
    """Save the data and return the run that trains `tasks` on `plan` on CPU ranks."""
    shape = read_shape(model_folder)
    cost_model = plain_cost_model(shape.num_layers)
    for policy in {group.layout.memory for group in plan.groups} - {"keep"}:
        cost_model = cost_model.taking_kept_times(policy)
    run = RunSpec(
        model_folder=model_folder,
        base_model=str(model_folder),
        fingerprint="",
        task_records=tuple(task_record(t, d) for t, d in zip(tasks, datasets, strict=True)),
        tasks=tasks,
        num_steps=tuple(task.steps or steps for task in tasks),
        last_step=steps,
        plan=plan,
        world=place(plan, 1 << 20),
        cost_model=cost_model,
        output_dir=folder,
        precision="fp32",
        device="cpu",
        num_buckets=4,
        dynamic_buckets=True,
        buckets=(),
        dispatch_mode="balance",
        seed=0,
    )
    run = replace(run, **changes)  # type: ignore[arg-type]
    for task, data in enumerate(datasets):
        data.save(run.data_folder(task))
    return run


def steps_of(run: RunSpec) -> list[StepMetrics]:
    """Return what a run that has ended wrote of its steps, those before a resume left out."""
    steps = []
    for line in read_metrics(run.output_dir)[run.resume_step or 0 :]:
        tasks = {
            name: TaskMetrics(**{key: _number(key, value) for key, value in task.items()})
            for name, task in line["tasks"].items()
        }
        replicas = [ReplicaMetrics(**replica) for replica in line["replicas"]]
        steps.append(StepMetrics(**{**line, "tasks": tasks, "replicas": replicas}))
    return steps


def _number(key: str, value: object) -> Any:
    return math.nan if value is None and key in ("loss", "grad_norm") else value


def train_steps(run: RunSpec, *target: str) -> list[StepMetrics]:
    """Train and return the steps."""
    run_local(run, *target)
    return steps_of(run)


def logits_on_rank(
    model_folder: Path,
    world: World,
    tasks: tuple[TaskConfig, ...],
    adapters: list[Path],
    tokens: np.ndarray,
    row_tasks: tuple[int, ...],
) -> np.ndarray:
    """Return this rank's slice of our model's logits [rows, positions, v] (tp only)."""
    specs = {number: adapter_spec(task) for number, task in enumerate(tasks)}
    stage = build_stage(model_folder, build_groups(world), specs)
    for number, folder in enumerate(adapters):
        stage.load(number, load_file(folder / WEIGHTS_FILE))
    ids = torch.from_numpy(tokens)
    batches = tensors_of(stage, [micro_batch(ids, ids, row_tasks)], [1.0] * len(tasks))
    return stage.logits(batches[0]).numpy()
