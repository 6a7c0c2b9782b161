"""DeepSpeed, as far as we need it: ZeRO-1 partitions of one task's adapter in one layer block.

One partition a task, so that tasks come and go without touching another's weights or moments.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
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


class Partition:
    """A holder's share of a flat tensor of weights: a master copy with its Adam moments.

    Attributes
    ----------
    master_p
        This holder's weights; all holders' end to end are the flat tensor and some padding.
    moments
        Of `MOMENTS` each, like `master_p`.
    """

    def __init__(self, weights: Tensor, weight_decay: float, group: dist.ProcessGroup) -> None:
        """Share the weights out. Collective over ``group``, whose ranks hold the same."""
        import deepspeed

        module = nn.Module()
        module.weights = nn.Parameter(weights.clone())
        adam = torch.optim.AdamW(
            module.parameters(), betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=weight_decay
        )
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adam,
            config=dict(ENGINE_CONFIG),
            mpu=HolderGroup(group),
            dist_init_required=False,
        )
        zero = self.engine.optimizer
        self.adam = zero.optimizer
        (self.master_p,) = zero.single_partition_of_fp32_groups
        if weights.dtype == torch.float64:  # ZeRO's masters are fp32 beside any weights
            own_p = zero.parallel_partitioned_bit16_groups[0][dist.get_rank(group)]
            self.master_p = own_p.detach().clone().requires_grad_(True)
            self.adam.param_groups[0]["params"] = [self.master_p]
        # The weights themselves are in the slot: ZeRO's copy of them is not needed.
        module.weights.data = weights.new_empty(0)
        zero.bit16_groups_flat.clear()
        zero.parallel_partitioned_bit16_groups.clear()
        self.moments = {moment: torch.zeros_like(self.master_p) for moment in MOMENTS}
        self.adam.state[self.master_p] = {"step": torch.zeros(()), **self.moments}

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
        self.adam.state[self.master_p]["step"].fill_(updates)

    def update(self, gradient_p: Tensor, settings: Mapping[str, Any]) -> None:
        """Take one Adam step, with these of torch's settings from now on."""
        self.adam.param_groups[0].update(settings)
        self.master_p.grad = gradient_p
        self.adam.step()
        self.master_p.grad = None


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
