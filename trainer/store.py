"""Writing what was learnt: adapters and checkpoints, gathered from the ranks that hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from lobra.layout.shapes import ModelShape
from lobra.model.lora import AdapterBank
from lobra.model.precision import DTYPES, kept_dtype
from lobra.trainer.adapters import gather_tensors, not_finite, save_adapter
from lobra.trainer.checkpoint import CheckpointState, CheckpointWriter
from lobra.trainer.engines import AdapterOptimizer
from lobra.trainer.run_spec import RunSpec

log = logging.getLogger(__name__)


class AdapterStore:
    """Gathers this rank's adapters to rank 0 and writes them. All methods are collective."""

    def __init__(
        self,
        run: RunSpec,
        bank: AdapterBank,
        shape: ModelShape,
        optimizer: AdapterOptimizer,
        control_group: dist.ProcessGroup,
    ) -> None:
        self.run = run
        self.bank = bank
        self.shape = shape
        self.optimizer = optimizer
        self.control = control_group
        self.is_writer = dist.get_rank() == 0
        blocks = run.world.blocks(shape.num_layers)
        self.moments_are_split = any(len(block.holders) > 1 for block in blocks)

    def _gather(self, task: int, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        spec = self.bank.specs[task]
        kept = kept_dtype(DTYPES[self.run.precision])
        return gather_tensors(own, spec, self.shape, self.run.world, self.control, kept)

    def save_checkpoint(self, state: CheckpointState | None) -> None:
        """Write the checkpoint of `state` (None but on rank 0): every task's weights and moments.

        Moments are gathered on the devices, where a rank may wait for others only as long as NCCL
        is patient. So before each task's, all wait on the control group, whose patience is long,
        until rank 0 has written the task before.
        """
        writer = None if state is None else CheckpointWriter(self.run.output_dir, state.step)
        for task, spec in enumerate(self.bank.specs):
            weights = self._gather(task, self.bank.named_tensors(task))
            if self.moments_are_split:
                dist.barrier(group=self.control)
            moments = {
                kind: self._gather(task, own) for kind, own in self.optimizer.moments(task).items()
            }
            if writer is not None:
                writer.add_task(spec, weights, moments, self.run.base_model)
        if writer is not None and state is not None:
            writer.finish(state, self.run.keep_last)
        dist.barrier(group=self.control)

    def export_adapters(self) -> None:
        """Write every task's adapter folder."""
        for task, spec in enumerate(self.bank.specs):
            tensors = self._gather(task, self.bank.named_tensors(task))
            if self.is_writer:
                if bad := not_finite(tensors):
                    log.warning(
                        "the adapter of task %s holds values that are not finite (%s and %d more); "
                        "it is of no use",
                        spec.name, bad[0], len(bad) - 1,
                    )  # fmt: skip
                save_adapter(self.run.adapter_folder(task), spec, tensors, self.run.base_model)
        dist.barrier(group=self.control)
