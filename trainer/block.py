"""One layer block's adapters: DeepSpeed's ZeRO-1 partitions, exchanged in one piece.

A block is the layers with the same holders. DeepSpeed lays each task's adapter out flat, splits it
over the holders and keeps this rank's part with its Adam moments. The exchange is ours, because a
step concerns only some tasks: whatever their number, a block's gradients are one reduce-scatter
and its new weights one all-gather, and finished tasks are in neither.

Shape suffixes: W holders, p a task's elements per holder (its padding included), n those of all
tasks that take part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lobra.layout.world import LayerBlock
from lobra.model.lora import AdapterBank
from lobra.tasks.config import TaskConfig
from lobra.trainer.optimizer import task_optimizer

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


class HolderGroup:
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


class BlockOptimizer:
    """The adapters of one layer block on one of its holders.

    Every parameter's gradient is a view into one flat buffer for as long as this object lives: the
    backward pass adds into it, and what did not run is zero without anyone filling it in.
    """

    def __init__(
        self,
        tasks: Sequence[TaskConfig],
        bank: AdapterBank,
        block: LayerBlock,
        group: dist.ProcessGroup,
    ) -> None:
        """Create the engine. Collective over `group`, the block's holders."""
        self.block = block
        self.group = group
        self.num_holders = dist.get_world_size(group)
        self.parameters = [bank.parameters(t, block.layers) for t in range(len(tasks))]
        self.zero = _zero_partitions(tasks, self.parameters, group)
        self.adam = self.zero.optimizer
        self.weights_Wp: list[Tensor] = list(self.zero.bit16_groups_flat)
        if self.weights_Wp[0].dtype == torch.float64:
            _keep_double(self.zero)
        self.masters_p: list[Tensor] = list(self.zero.single_partition_of_fp32_groups)
        self.gradients = torch.zeros(
            sum(len(flat) for flat in self.weights_Wp),
            dtype=self.weights_Wp[0].dtype,
            device=self.weights_Wp[0].device,
        )
        self.gradients_Wp = list(self.gradients.split([len(flat) for flat in self.weights_Wp]))
        self.reduced_p: dict[int, Tensor] = {}
        self._make_states()
        for task in range(len(tasks)):
            for parameter, place in self._places(task):
                parameter.grad = self.gradients_Wp[task][place].view_as(parameter)

    def _make_states(self) -> None:
        """Make every task's moments now, as AdamW would at the task's own first step."""
        for master_p in self.masters_p:
            self.adam.state[master_p] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(master_p),
                "exp_avg_sq": torch.zeros_like(master_p),
            }

    def _places(self, task: int) -> list[tuple[nn.Parameter, slice]]:
        """Return the task's parameters, each with its place in the task's flat tensors."""
        flat = self.weights_Wp[task]
        places = []
        for parameter in self.parameters[task]:
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            assert 0 <= start <= len(flat) - parameter.numel(), "not where ZeRO laid it out"
            places.append((parameter, slice(start, start + parameter.numel())))
        return places

    @torch.no_grad()
    def reduce(self, takes_part: Sequence[bool]) -> Tensor:
        """Sum the gradients of the tasks that take part over the holders. Collective.

        Returns:
            The squared norm of each task's part on this rank, fp64 [num_tasks], on the device.
        """
        tasks = [task for task, part in enumerate(takes_part) if part]
        nothing = torch.zeros((), dtype=torch.float64, device=self.gradients.device)
        self.reduced_p = {}
        if not tasks:
            return nothing.repeat(len(takes_part))
        if self.num_holders == 1:
            parts = [self.gradients_Wp[task] for task in tasks]
        else:
            # One row a holder, so that its part of every task lies in one piece.
            rows = [self.gradients_Wp[task].view(self.num_holders, -1) for task in tasks]
            stacked_Wn = torch.cat(rows, dim=1)
            own_n = torch.empty_like(stacked_Wn[0])
            dist.reduce_scatter_tensor(own_n, stacked_Wn.flatten(), group=self.group)
            parts = list(own_n.split([row.shape[1] for row in rows]))
        self.reduced_p = dict(zip(tasks, parts, strict=True))
        norms = dict(zip(tasks, torch._foreach_norm(parts, 2, dtype=torch.float64), strict=True))
        return torch.stack([norms.get(task, nothing) for task in range(len(takes_part))]).square()

    @torch.no_grad()
    def update(self, rates: Mapping[int, float], clips: Mapping[int, float]) -> None:
        """Take one Adam step for the tasks with a rate; forget all gradients. Collective.

        Args:
            rates: the learning rate of every task that is updated; the same on every rank.
            clips: what their gradients are multiplied by.
        """
        for task, group in enumerate(self.adam.param_groups):
            group["skip"] = task not in rates
            if task in rates:
                group["lr"] = rates[task]
                if clips[task] != 1.0:
                    self.reduced_p[task].mul_(clips[task])
                self.masters_p[task].grad = self.reduced_p[task]
        if rates:
            self.adam.step()
            self._gather(sorted(rates))
        for master_p in self.masters_p:
            master_p.grad = None
        self.reduced_p = {}
        self.gradients.zero_()

    def _gather(self, tasks: Sequence[int]) -> None:
        """Give every holder the updated weights of these tasks."""
        own_n = torch.cat([self.masters_p[task] for task in tasks])
        gathered_Wn = _all_gather(own_n, self.num_holders, self.group)
        sizes = [len(self.masters_p[task]) for task in tasks]
        for task, part_Wp in zip(tasks, gathered_Wn.split(sizes, dim=1), strict=True):
            self.weights_Wp[task].view(self.num_holders, -1).copy_(part_Wp)

    @torch.no_grad()
    def moments(self, task: int) -> dict[str, list[Tensor]]:
        """Return the task's moments, one tensor a parameter, in `parameters` order. Collective.

        They are on the CPU, on the block's first holder; the others get none.
        """
        state = self.adam.state[self.masters_p[task]]
        own_n = torch.cat([state[moment] for moment in MOMENTS])
        gathered_Wn = _all_gather(own_n, self.num_holders, self.group)
        if dist.get_rank() != self.block.holders[0]:
            return {moment: [] for moment in MOMENTS}
        flats = gathered_Wn.chunk(len(MOMENTS), dim=1)
        moments = {}
        for moment, flat_Wp in zip(MOMENTS, flats, strict=True):
            flat = flat_Wp.flatten().cpu()
            moments[moment] = [flat[place].view(p.shape) for p, place in self._places(task)]
        return moments

    @torch.no_grad()
    def load_moments(
        self, task: int, moments: Mapping[str, Sequence[Tensor]], updates: int
    ) -> None:
        """Set the task's moments (one tensor a parameter, CPU) and its count of updates."""
        state = self.adam.state[self.masters_p[task]]
        size = len(self.masters_p[task])
        start = dist.get_rank(self.group) * size
        for moment in MOMENTS:
            flat = torch.zeros(size * self.num_holders, dtype=state[moment].dtype)
            for (_, place), value in zip(self._places(task), moments[moment], strict=True):
                flat[place] = value.flatten()
            state[moment].copy_(flat[start : start + size])
        state["step"].fill_(updates)


def _all_gather(own_n: Tensor, num_holders: int, group: dist.ProcessGroup) -> Tensor:
    """Return every holder's [n] as [W, n]."""
    if num_holders == 1:
        return own_n.unsqueeze(0)
    gathered = torch.empty(num_holders * len(own_n), dtype=own_n.dtype, device=own_n.device)
    dist.all_gather_into_tensor(gathered, own_n, group=group)
    return gathered.view(num_holders, -1)


def _keep_double(zero: Any) -> None:
    """Undo what ZeRO does beside fp64 weights: fp32 masters, hooks that copy gradients to fp32."""
    rank = dist.get_rank(zero.dp_process_group)
    for task, parts_Wp in enumerate(zero.parallel_partitioned_bit16_groups):
        master_p = parts_Wp[rank].detach().clone().requires_grad_(True)
        zero.single_partition_of_fp32_groups[task] = master_p
        zero.optimizer.param_groups[task]["params"] = [master_p]
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero._grad_acc_hooks.clear()


def _zero_partitions(
    tasks: Sequence[TaskConfig],
    parameters: Sequence[Sequence[nn.Parameter]],
    group: dist.ProcessGroup,
) -> Any:
    """Return DeepSpeed's ZeRO-1 optimiser over the adapters, one parameter group a task."""
    import deepspeed

    module = nn.Module()
    module.adapters = nn.ParameterList(p for own in parameters for p in own)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=task_optimizer(tasks, parameters),
        config=dict(ENGINE_CONFIG),
        mpu=HolderGroup(group),
        dist_init_required=False,
    )
    return engine.optimizer
