"""Ours: what one rank does in a step of training, from the step's order to the updated adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from benchmarks.sides.job import MAX_GRAD_NORM, MODULES, fresh_adapter, task_name
from benchmarks.sides.side import COMPUTE, Clock, Setting, Step, Trained
from lobra.layout.layout import Layout
from lobra.layout.order import StepOrder
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.world import one_replica
from lobra.model.groups import build_groups
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors
from lobra.model.pipeline import run_replica
from lobra.model.stage import build_stage
from lobra.planner.packed.dispatch import dispatch_packed, packed_costs
from lobra.profiler.cost_model import fit_cost_model
from lobra.profiler.profiles import TimeProfile
from lobra.tasks.config import TaskConfig
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.optimizer import AdapterOptimizer, TaskUpdate
from lobra.trainer.orders import order_of
from lobra.trainer.schedule import clip_coefficient
from lobra.trainer.zero import start_deepspeed

ALONE = Layout(1, 1)


class Ours:
    """All tasks together on one replica of one rank.

    A step's order is made before the clock starts: in training a thread makes it while the step
    before is computed.
    """

    def __init__(self, setting: Setting, layout: Layout = ALONE) -> None:
        start_deepspeed(setting.device)
        self.setting = setting
        self.device = torch.device(setting.device)
        names = (task_name(task) for task in range(setting.num_tasks))
        self.tasks = tuple(_task(name, setting.rank) for name in names)
        world = one_replica(layout)
        self.stage = build_stage(
            setting.folder,
            build_groups(world),
            {number: adapter_spec(task) for number, task in enumerate(self.tasks)},
            dtype=setting.dtype,
            device=self.device,
        )
        for task in range(setting.num_tasks):
            self.stage.load(task, fresh_adapter(setting.job.model, task, setting.rank))
        layers = setting.job.model.layers
        self.optimizer = AdapterOptimizer(self.stage, world)
        for number, task in enumerate(self.tasks):
            self.optimizer.install(number, task)
        self.plan = Plan((ReplicaGroup(ALONE, 1, setting.job.max_tokens),))
        self.cost_model = fit_cost_model(_plain_times(setting.job.max_tokens), layers)

    def train(self, step: Step) -> Trained:
        """Train all tasks' sequences together, then update every task."""
        order = self._order(step)
        clock = Clock(self.setting.device)
        numbers = sorted(order.work)
        shares = np.zeros(len(self.tasks))
        shares[numbers] = [1 / order.work[number].labels for number in numbers]
        batches = self._tensors(order, shares)
        with record_function(COMPUTE):
            losses = run_replica(self.stage, batches, len(self.tasks))
        compute_s = clock.seconds()
        rate = self.setting.job.learning_rate
        norms = self.optimizer.reduce(numbers).sqrt().tolist()
        clips = [clip_coefficient(norm, MAX_GRAD_NORM) for norm in norms]
        updates = {n: TaskUpdate(True, rate, clip) for n, clip in zip(numbers, clips, strict=True)}
        self.optimizer.update(updates)
        time_s = clock.seconds()
        means = tuple((losses.cpu() * torch.from_numpy(shares)).tolist())
        return Trained(time_s, compute_s, means, len(batches), order.padded_tokens)

    def layers_of(self, step: Step) -> tuple[int, Callable[[], Tensor]]:
        """Return the tokens of a step's first micro-batch, and what runs all layers over it."""
        batch = self._tensors(self._order(step), np.zeros(len(self.tasks)))[0]
        return batch.tokens_BS.numel(), partial(self.stage.hidden, batch, None)

    def _tensors(self, order: StepOrder, weights: np.ndarray) -> list[MicroBatchTensors]:
        return micro_batch_tensors(order.replicas[0], weights, self.device, self.setting.dtype)

    def _order(self, step: Step) -> StepOrder:
        lengths = [len(sequence.tokens) for sequence in step]
        costs = packed_costs(self.plan, self.cost_model)
        return order_of(0, step, (), dispatch_packed(lengths, self.plan, costs))


def _task(name: str, rank: int) -> TaskConfig:
    return TaskConfig(name, rank, rank, MODULES, 1, name, 1, max_grad_norm=MAX_GRAD_NORM)


def _plain_times(max_tokens: int) -> TimeProfile:
    """Return times that follow the tokens. On one replica only the order depends on them."""
    sizes = [2**n for n in range(4, max_tokens.bit_length() + 1)]
    rows = [(1, s, b) for s in sizes for b in (1, 2, 4)]
    tp, s, b = (np.asarray(column) for column in zip(*rows, strict=True))
    return TimeProfile(tp, s, b, 1 + b * s / 100)
