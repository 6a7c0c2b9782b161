"""Writing what was learned: adapters and checkpoints, gathered from the ranks that hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from lobra.model.pissa import joined
from lobra.model.slot import Slot
from lobra.model.stage import Stage
from lobra.trainer.adapters import gather_tensors, not_finite, save_adapter
from lobra.trainer.checkpoint import CheckpointState, CheckpointWriter
from lobra.trainer.optimizer import AdapterOptimizer
from lobra.trainer.run_spec import RunSpec

log = logging.getLogger(__name__)


class AdapterExporter:
    """Gathers this rank's adapters to rank 0 and writes them. All methods are collective."""

    def __init__(
        self,
        run: RunSpec,
        stage: Stage,
        optimizer: AdapterOptimizer,
        control_group: dist.ProcessGroup,
    ) -> None:
        self.run = run
        self.stage = stage
        self.optimizer = optimizer
        self.control = control_group
        self.is_writer = dist.get_rank() == 0
        blocks = run.world.blocks(stage.shape.num_layers)
        self.moments_are_split = any(len(block.holders) > 1 for block in blocks)

    def _gather(self, slot: Slot, own: Mapping[range, Tensor]) -> dict[str, Tensor]:
        return gather_tensors(
            own, slot.spec, self.stage.shape, self.run.world, self.control, slot.weights.dtype
        )

    def _weights(self, slot: Slot) -> dict[str, Tensor]:
        weights = self._whole(slot, slot.weights)
        if slot.start is not None:
            weights = joined(weights, self._whole(slot, slot.start))
        if slot.projections is not None and self.is_writer:
            weights |= slot.spec.projections(self.stage.shape).named()
        return weights

    def _whole(self, slot: Slot, flat: Tensor) -> dict[str, Tensor]:
        layers = [block.block.layers for block in self.optimizer.blocks]
        return self._gather(slot, {own: flat[slot.layout.span(own)] for own in layers})

    def save_checkpoint(self, state: CheckpointState | None) -> None:
        """Write the checkpoint of `state` (None but on rank 0): every task's weights and moments.

        Moments are gathered on the devices, where a rank may wait for others only as long as NCCL
        is patient. So before each task's, all wait on the control group, whose patience is long,
        until rank 0 has written the task before.
        """
        writer = None if state is None else CheckpointWriter(self.run.output_dir, state.step)
        for number, slot in self.stage.slots.items():
            weights = self._weights(slot)
            if self.moments_are_split:
                dist.barrier(group=self.control)
            moments = {
                kind: self._gather(slot, own)
                for kind, own in self.optimizer.moments(number).items()
            }
            if writer is not None:
                writer.add_task(slot.spec, weights, moments, self.run.base_model)
        if writer is not None and state is not None:
            writer.finish(state, self.run.keep_last)
        dist.barrier(group=self.control)

    def export_adapters(self) -> None:
        """Write every task's adapter folder."""
        for number, slot in self.stage.slots.items():
            tensors = self._weights(slot)
            if self.is_writer:
                if bad := not_finite(tensors):
                    log.warning(
                        "the adapter of task %s holds values that are not finite (%s and %d more); "
                        "it is of no use",
                        slot.spec.name, bad[0], len(bad) - 1,
                    )  # fmt: skip
                folder = self.run.adapter_folder(number)
                save_adapter(folder, slot.spec, tensors, self.run.base_model)
        dist.barrier(group=self.control)
