"""One DeepSpeed ZeRO-1 engine per layer block, over exactly the ranks that hold it.

DeepSpeed's own notion of a rectangular data-parallel grid does not fit a heterogeneous plan. Here
each engine owns only adapters, and its data-parallel group is the block's holders: inside a
tensor-parallel group and across replicas alike, since canonical adapters make the gradient a
plain sum over holders (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.lora import AdapterBank
from model.topology import Grid, LayerBlock, layer_blocks
from tasks.config import TaskConfig
from trainer.optimizer import task_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
ENGINE_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 1,
        "overlap_comm": False,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "compute_grad_norm": False,
    },
    "zero_allow_untested_optimizer": True,
    "gradient_allreduce_op": "sum",
    "gradient_clipping": 0.0,  # clipping is per task, see `TaskUpdate.clip`
    "steps_per_print": 10**9,
}


class _HolderGroup:
    """What DeepSpeed asks of `mpu`: the data-parallel group is the block's holders.

    The model-parallel size is 1 everywhere: DeepSpeed would otherwise divide norms by sizes that
    differ between replicas.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> None:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0


@dataclass(frozen=True)
class TaskUpdate:
    """What one step does to a task: whether its update is applied, the rate, the clipping factor.

    A task that is not applied keeps its weights and its moments exactly.
    """

    apply: bool
    learning_rate: float = 0.0
    clip: float = 1.0


class AdapterOptimizer:
    """The engines of the blocks this rank holds, walked in the same order on every rank."""

    def __init__(
        self,
        tasks: Sequence[TaskConfig],
        bank: AdapterBank,
        grids: Sequence[Grid],
        num_layers: int,
    ) -> None:
        """Create the engines. Collective: every rank of the world calls it with the same plan."""
        self.tasks = tuple(tasks)
        self.bank = bank
        self.blocks: list[LayerBlock] = []
        self.parameters: list[list[list[nn.Parameter]]] = []
        self.engines: list[Any] = []
        rank = dist.get_rank()
        for block in layer_blocks(grids, num_layers):
            group = dist.new_group(list(block.holders))
            if rank not in block.holders:
                continue
            parameters = [bank.parameters(t, block.layers) for t in range(len(self.tasks))]
            self.blocks.append(block)
            self.parameters.append(parameters)
            self.engines.append(self._engine(parameters, _HolderGroup(group)))

    def _engine(self, parameters: list[list[nn.Parameter]], mpu: _HolderGroup) -> Any:
        import deepspeed

        module = nn.Module()
        module.adapters = nn.ParameterList(p for own in parameters for p in own)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=task_optimizer(self.tasks, parameters),
            config=dict(ENGINE_CONFIG),
            mpu=mpu,
            dist_init_required=False,
        )
        # Make every task's moments now, as AdamW would at its first step: deepspeed links them to
        # the parameters once, when some tasks may not have stepped yet.
        for group in engine.optimizer.param_groups:
            for partition in group["params"]:
                engine.optimizer.optimizer.state[partition] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(partition),
                    "exp_avg_sq": torch.zeros_like(partition),
                }
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        return engine

    def reduce(self) -> Tensor:
        """Sum the gradients over the holders of each block. Collective.

        Returns:
            This rank's part of each task's squared gradient norm [num_tasks], fp64, CPU. A rank
            owns one ZeRO partition of each block it holds and partitions are disjoint, so the sum
            over the world is the squared norm.
        """
        squared = torch.zeros(len(self.tasks), dtype=torch.float64)
        for engine, parameters in zip(self.engines, self.parameters, strict=True):
            for own in parameters:
                for parameter in own:  # what did not run here still takes part in the sum
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            engine.set_gradient_accumulation_boundary(True)
            engine.allreduce_gradients()
            norms = [
                torch.stack([g.double().square().sum() for g in gradients]).sum()
                for _, gradients in sorted(engine.optimizer.averaged_gradients.items())
            ]
            squared += torch.stack(norms).cpu()
        return squared

    def update(self, updates: Sequence[TaskUpdate]) -> None:
        """Apply each task's update to the reduced gradients. Collective."""
        for engine in self.engines:
            for task, update in enumerate(updates):
                group = engine.optimizer.param_groups[task]
                group["lr"] = update.learning_rate
                group["skip"] = not update.apply
                if update.apply and update.clip != 1.0:
                    for gradient in engine.optimizer.averaged_gradients[task]:
                        gradient.mul_(update.clip)
            engine.step()

    def moments(self, task: int) -> dict[str, dict[str, Tensor]]:
        """Return the task's Adam moments by PEFT's names, for this rank's layers. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = self.bank.named_parameters(task)
        return {
            moment: {
                name: safe_get_full_optimizer_state(parameter, moment).cpu()
                for name, parameter in parameters.items()
            }
            for moment in MOMENTS
        }

    def load_moments(
        self, task: int, moments: Mapping[str, Mapping[str, Tensor]], updates: int
    ) -> None:
        """Set the task's Adam moments (PEFT's names) and its count of applied updates."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for moment in MOMENTS:
            for name, parameter in self.bank.named_parameters(task).items():
                value = moments[moment][name].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, moment)
        for engine in self.engines:
            for partition in engine.optimizer.param_groups[task]["params"]:
                engine.optimizer.optimizer.state[partition]["step"].fill_(updates)
