"""DeepSpeed, as far as we need it: ZeRO-1 partitions of one task's adapter in one layer block.

One partition a task, so that tasks come and go without touching another's weights or moments.
"""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lobra.layout.base_precision import quieten_library
from lobra.tasks.config import TaskConfig
from lobra.tasks.kinds import ADAMW_8BIT

EIGHT_BIT_BLOCK = 256  # elements with a scale of their own, as bitsandbytes has them
MASTER = "master"  # a partition's weights, where they are named beside its moments

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


def moment_names(optimizer: str, momentum: float) -> tuple[str, ...]:
    """Return what a task's optimiser keeps of each of its weights."""
    if optimizer != "sgd":
        return "exp_avg", "exp_avg_sq"
    return ("momentum_buffer",) if momentum else ()


def moment_bytes(optimizer: str, momentum: float) -> float:
    """Return the bytes of that for each of its weights, beside fp32 ones."""
    of_each = 1 + 4 / EIGHT_BIT_BLOCK if optimizer == ADAMW_8BIT else 4
    return of_each * len(moment_names(optimizer, momentum))


def kept_moments(task: TaskConfig | None) -> tuple[str, ...]:
    """Return `moment_names` of a task's optimiser; None: of AdamW."""
    return moment_names(task.optimizer, task.momentum) if task else moment_names("adamw", 0.0)


def _optimizer(weights: nn.Parameter, task: TaskConfig | None) -> torch.optim.Optimizer:
    """Return a task's optimiser."""
    if task is None:
        return torch.optim.AdamW([weights], weight_decay=0.0)
    rate, decay = task.learning_rate, task.weight_decay
    if task.optimizer == "sgd":
        return torch.optim.SGD([weights], rate, momentum=task.momentum, weight_decay=decay)
    betas = task.adam_beta1, task.adam_beta2
    if task.optimizer == ADAMW_8BIT:
        quieten_library()
        from bitsandbytes.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(
            [weights], rate, betas, task.adam_epsilon, weight_decay=decay
        )
        return eight_bit
    return torch.optim.AdamW([weights], rate, betas, task.adam_epsilon, weight_decay=decay)


class Partition:
    """A holder's share of a flat tensor of weights: a master copy with its optimiser's moments.

    Attributes
    ----------
    master_p
        This holder's weights; all holders' end to end are the flat tensor and some padding.
    """

    def __init__(
        self,
        weights: Tensor,
        task: TaskConfig | None,
        group: dist.ProcessGroup,
        rate_factors: Sequence[tuple[int, float]],
    ) -> None:
        """Share the weights out. Collective over ``group``, whose ranks hold the same.

        Parameters
        ----------
        weights
            Flat.
        task
            Whose they are: its optimiser; None: AdamW, whose settings come with every update.
        group
            The holders.
        rate_factors
            Of consecutive runs of the weights how many there are, and what the learning rate is
            multiplied by for them.
        """
        import deepspeed

        module = nn.Module()
        module.weights = nn.Parameter(weights.clone())
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=_optimizer(module.weights, task),
            config=dict(ENGINE_CONFIG),
            mpu=HolderGroup(group),
            dist_init_required=False,
        )
        zero = self.engine.optimizer
        self.optimizer = zero.optimizer
        (self.master_p,) = zero.single_partition_of_fp32_groups
        if weights.dtype == torch.float64:  # ZeRO's masters are fp32 beside any weights
            own_p = zero.parallel_partitioned_bit16_groups[0][dist.get_rank(group)]
            self.master_p = own_p.clone()
        self.master_p = self.master_p.detach()
        if task is not None and task.offload:
            self.master_p = self.master_p.cpu()
        # The weights themselves are in the slot: ZeRO's copy of them is not needed.
        module.weights.data = weights.new_empty(0)
        zero.bit16_groups_flat.clear()
        zero.parallel_partitioned_bit16_groups.clear()
        names = kept_moments(task)
        self.runs = _own_runs(rate_factors, self.size, dist.get_rank(group))
        (settings,) = self.optimizer.param_groups
        self.optimizer.param_groups, self.optimizer.state = [], defaultdict(dict)
        for runs in self.runs.values():
            params = [self.master_p[run] for run in runs]
            self.optimizer.param_groups.append({**settings, "params": params})
        self._keep_moments(names)
        self.num_updates = 0  # that were made on all holders

    def _keep_moments(self, names: Sequence[str]) -> None:
        self._moments = {moment: torch.zeros_like(self.master_p) for moment in names}
        for group, runs in zip(self.optimizer.param_groups, self.runs.values(), strict=True):
            for param, run in zip(group["params"], runs, strict=True):
                own = {moment: flat_p[run] for moment, flat_p in self._moments.items()}
                self.optimizer.state[param] = {"step": torch.zeros(()), **own}

    @property
    def moments(self) -> dict[str, Tensor]:
        """Of `moment_names` each, like `master_p`."""
        return self._moments

    def set(self, name: str, part: Tensor) -> None:
        """Set a moment, or `MASTER`; what lies beyond the end of ``part`` is padding."""
        own_p = self.master_p if name == MASTER else self._moments[name]
        own_p[: len(part)].copy_(part)

    def close(self) -> None:
        """Release DeepSpeed's engine.

        It imports modules when it is destroyed, which must not be left to the garbage collector:
        that may run inside another import. Without a module it finds nothing more to do.
        """
        self.engine.destroy()
        self.engine.module = None

    @property
    def size(self) -> int:
        """Elements of a holder, padding included."""
        return len(self.master_p)

    def set_updates(self, updates: int) -> None:
        """Set how many updates the moments have seen."""
        self.num_updates = updates
        for of_run in self.optimizer.state.values():
            of_run["step"].fill_(updates)

    def update(self, gradient_p: Tensor, changed: Mapping[str, Any]) -> None:
        """Take one step of the optimiser, with these of torch's settings from now on."""
        for settings, (factor, runs) in zip(
            self.optimizer.param_groups, self.runs.items(), strict=True
        ):
            settings.update(changed)
            settings["lr"] = changed["lr"] * factor
            for weights, run in zip(settings["params"], runs, strict=True):
                weights.grad = gradient_p[run].to(weights.device)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def take_back(self, weights_p: Tensor) -> None:
        """Be as before an update that has failed somewhere: the master copy is ``weights_p``.

        It is then as exact as these are: of a model that is trained whole in bf16, rounded. Moments
        keep what they have seen, as far as it is finite.
        """
        self.master_p[: len(weights_p)].copy_(weights_p)
        for name, moment_p in self.moments.items():
            if not moment_p.isfinite().all():
                self.set(name, moment_p.nan_to_num(0.0, 0.0, 0.0))
        self.set_updates(self.num_updates)
        self.optimizer.zero_grad()


def _own_runs(
    rate_factors: Sequence[tuple[int, float]], size: int, place: int
) -> dict[float, list[slice]]:
    """Return, by rate factor, the runs of a holder's elements, of which each holder has ``size``.

    Padding is in none.
    """
    runs: dict[float, list[slice]] = {}
    stop = -place * size
    for numel, factor in rate_factors:
        start, stop = stop, stop + numel
        run = slice(max(start, 0), min(stop, size))
        if run.start < run.stop:
            runs.setdefault(factor, []).append(run)
    return runs


def start_deepspeed(device: str) -> None:
    """Bring up deepspeed over the process group that exists, quietly and without a compiler."""
    import deepspeed.ops

    # On CPU deepspeed would otherwise JIT-build a shared-memory extension (35 s, needs a compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # deepspeed 0.19 calls what torch 2.13 has renamed; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
    )
