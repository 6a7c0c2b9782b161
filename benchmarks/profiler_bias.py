"""Predicted against measured processor time of real training steps, on a machine that is busy.

    python benchmarks/profiler_bias.py DATA_DIR [--steps 8]

One process measures the time profile's shapes of the tiny model with the quickstart tasks'
adapters, fits the cost model, and runs the micro-batches that the dispatcher makes of real steps,
all in processor time of one thread, which other work disturbs less than the wall clock.
Printed: the error of every step, and what it would be without knowing the share of labels, or with
every micro-batch mixed of all tasks.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lobra.layout.layout import Layout  # noqa: E402
from lobra.layout.plan import Plan, ReplicaGroup  # noqa: E402
from lobra.layout.shapes import read_shape  # noqa: E402
from lobra.layout.world import one_replica  # noqa: E402
from lobra.model.folder import resolve_folder  # noqa: E402
from lobra.model.groups import build_groups  # noqa: E402
from lobra.model.lora import AdapterSpec  # noqa: E402
from lobra.model.pipeline import run_replica  # noqa: E402
from lobra.model.stage import Stage, build_stage  # noqa: E402
from lobra.planner.dispatch import dispatch  # noqa: E402
from lobra.planner.workload import label_share  # noqa: E402
from lobra.profiler.cost_model import CostModel, fit_cost_model  # noqa: E402
from lobra.profiler.head import PROFILED_SHARE, HeadProfile  # noqa: E402
from lobra.profiler.layer_time_rank import (  # noqa: E402
    NUM_MIXTURES,
    _build_probes,
    _ends_run,
    _layer_run,
    row_mixtures,
)
from lobra.profiler.memory_rank import synthetic_batch  # noqa: E402
from lobra.profiler.points import time_points  # noqa: E402
from lobra.profiler.profiles import TimeProfile  # noqa: E402
from lobra.tasks.config import load_trainer_config  # noqa: E402
from lobra.tasks.dataset import load_dataset  # noqa: E402
from lobra.tasks.tokenizer import load_tokenizer  # noqa: E402
from lobra.trainer.batches import draw_sequences, micro_batch_tensors  # noqa: E402
from lobra.trainer.orders import order_of  # noqa: E402

MAX_TOKENS = 2048
CPU = torch.device("cpu")
REPEATS = 3


def processor_ms(runs: Sequence[Callable[[], object]]) -> float:
    """Return the processor time of the functions, ms: the mean, each at its least disturbed."""
    found = []
    for run in runs:
        run()
        times = []
        for _ in range(REPEATS):
            begin = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - begin))
        found.append(min(times))
    return float(np.mean(found))


def profiled(
    layers: Stage, ends: Stage, num_tasks: int, weights: Sequence[float], even: bool
) -> list[tuple[int, int, int, float, float, float]]:
    """Return (tp, s, b, layer ms, ends' ms without labels, with labels) of the profile's shapes."""
    rows = []
    for b, s in time_points(MAX_TOKENS):
        batch = synthetic_batch((b, s), layers.shape, num_tasks, CPU, PROFILED_SHARE)
        nothing = replace(batch, targets=batch.targets.none())
        received = torch.randn(b, s, layers.shape.hidden_size)
        gradient = torch.randn_like(received)
        mixtures = [batch.row_tasks] if even else row_mixtures(b, weights, NUM_MIXTURES)
        batches = [replace(batch, row_tasks=tasks) for tasks in mixtures]
        layer_ms = processor_ms([_layer_run(layers, one, received, gradient) for one in batches])
        base_ms = processor_ms([_ends_run(layers, ends, nothing, received)])
        head_ms = processor_ms([_ends_run(layers, ends, batch, received)])
        rows.append((1, s, b, layer_ms / len(layers.layers), min(base_ms, head_ms), head_ms))
    return rows


def cost_model_of(rows: list[tuple[int, int, int, float, float, float]], layers: int) -> CostModel:
    """Return the cost model fitted to what `profiled` found."""
    table = np.array(rows)
    tp, s, b = (table[:, column].astype(np.int64) for column in range(3))
    settings = {"settings": {"label_share": PROFILED_SHARE}}
    head = HeadProfile(TimeProfile(tp, s, b, table[:, 5], meta=settings), table[:, 4])
    layer = TimeProfile(tp, s, b, table[:, 3], meta=settings)
    return fit_cost_model(layer, layers, head_profile=head)


def main() -> None:
    """Profile, run real steps, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", type=Path, help="where the quickstart's data sets are or go")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    folder = resolve_folder("tiny")
    tasks = load_trainer_config(ROOT / "trainer_config" / "quickstart.json").tasks
    tokenizer = load_tokenizer(folder)
    data = [load_dataset(task, tokenizer, args.data_dir) for task in tasks]
    specs = tuple(AdapterSpec(t.name, t.rank, t.lora_alpha, t.target_modules) for t in tasks)
    groups = build_groups(one_replica(Layout(1, 1)))
    stage = build_stage(folder, groups, specs)
    layers, ends = _build_probes(folder, groups, specs, torch.float32, CPU)
    weights = [float(task.global_batch_size) for task in tasks]
    depth = read_shape(folder).num_layers
    print(f"load {os.getloadavg()[0]:.1f}")
    share = label_share(tasks, data)
    before = profiled(layers, ends, len(tasks), weights, even=False)
    even = cost_model_of(profiled(layers, ends, len(tasks), weights, even=True), depth)
    plan = Plan((ReplicaGroup(Layout(1, 1), 1, MAX_TOKENS),))
    steps = []
    for step in range(args.steps):
        drawn = [
            sequence
            for number, (task, own) in enumerate(zip(tasks, data, strict=True))
            for sequence in draw_sequences(number, task, own, 0, step)
        ]
        assignment = dispatch([len(sequence.tokens) for sequence in drawn], plan, even)
        micro_batches = order_of(step, drawn, (), assignment).replicas[0]
        scale = torch.full((len(tasks),), 1e-3)
        measured_ms, shapes = 0.0, []
        for micro_batch in micro_batches:
            tensors = micro_batch_tensors(micro_batch, scale, CPU)
            measured_ms += processor_ms([lambda t=tensors: run_replica(stage, [t], len(tasks))])
            shapes.append((len(micro_batch.sequences), micro_batch.padded_length))
        steps.append((measured_ms, np.array(shapes)))
        print(f"step {step}: {len(micro_batches)} micro-batches, {measured_ms:.0f} ms", flush=True)
    after = profiled(layers, ends, len(tasks), weights, even=False)
    model = cost_model_of(before + after, depth)
    print(f"share of labels {share:.2f}; load {os.getloadavg()[0]:.1f}")
    for name, used in (
        ("as the profiler does", model.for_training(share, 0)),
        ("share of labels not known", model),
        ("all tasks in every micro-batch", even.for_training(share, 0)),
        ("neither", even),
    ):
        error = np.array(
            [used.chunk_time_ms(1, 1, s[:, 0], s[:, 1]).sum() / ms - 1 for ms, s in steps]
        )
        listed = " ".join(f"{100 * e:+.0f}" for e in error)
        median = 100 * np.median(np.abs(error))
        print(
            f"{name:32} median error {median:5.1f} %, mean {100 * error.mean():+5.1f} %: {listed}"
        )


if __name__ == "__main__":
    main()
