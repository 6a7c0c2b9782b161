"""Writing what was learned: adapters and checkpoints, gathered from the ranks that hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from lobra.common.storage import StorageError, told_as_storage
from lobra.model.flat_tensors import FlatTensors
from lobra.model.heartbeat import beat
from lobra.model.pissa import joined
from lobra.model.slot import Slot
from lobra.model.stage import Stage
from lobra.trainer.adapters import gather_tensors, not_finite, save_adapter
from lobra.trainer.checkpoint import CheckpointState, CheckpointWriter, load_best
from lobra.trainer.optimizer import AdapterOptimizer
from lobra.trainer.run_spec import RunSpec

log = logging.getLogger(__name__)


class AdapterExporter:
    """Gathers this rank's adapters to rank 0 and writes them. All methods are collective.

    Attributes
    ----------
    kept
        Of every task with a best adapter its tensors by PEFT's names; they are on rank 0 alone,
        elsewhere there are none.
    """

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
        self.kept: dict[int, dict[str, Tensor]] = {}
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

    def _moments(self, slot: Slot) -> dict[str, dict[str, Tensor]]:
        if self.moments_are_split:
            dist.barrier(group=self.control)
        own = self.optimizer.moments(slot.number)
        return {kind: self._gather(slot, flat) for kind, flat in own.items()}

    def save_slot(self, slot: Slot, folder: Path, with_moments: bool) -> None:
        """Write one task's adapter folder, with its moments if asked for."""
        weights = self._weights(slot)
        moments = self._moments(slot) if with_moments else None
        if self.is_writer:
            save_adapter(folder, slot.spec, weights, self.run.base_model, moments)

    def save_checkpoint(self, state: CheckpointState | None) -> StorageError | None:
        """Write the checkpoint of `state` (None but on rank 0): every task's weights and moments.

        Moments are gathered on the devices, where a rank may wait for others only as long as NCCL
        is patient. So before each task's, all wait on the control group, whose patience is long,
        until rank 0 has written the task before.

        Returns
        -------
        StorageError or None
            On rank 0, why the checkpoint could not be written.
        """
        writer = None
        if state is not None:
            writer = CheckpointWriter(self.run.output_dir, state.step, self._checkpoint_bytes())
        for number, slot in self.stage.slots.items():
            beat("writing")
            weights = self._weights(slot)
            moments = self._moments(slot)
            if writer is not None:
                writer.add_task(slot.spec, weights, moments, self.run.base_model)
                if number in self.kept:
                    writer.add_best(slot.spec, self.kept[number], self.run.base_model)
        failure = None
        try:
            if writer is not None and state is not None:
                writer.finish(state, self.run.keep_checkpoints)
        except StorageError as error:
            failure = error
        dist.barrier(group=self.control)
        return failure

    def _checkpoint_bytes(self) -> int:
        """Return the size of all tasks' weights and moments, and of the best adapters kept."""
        shape = self.stage.shape
        return sum(
            FlatTensors.whole(slot.spec, shape).numel
            * slot.weights.itemsize
            * (1 + len(self.optimizer.moment_names(number)) + (number in self.kept))
            for number, slot in self.stage.slots.items()
        )

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep these tasks' adapters, as they are now, as the best of theirs."""
        for number in numbers:
            now = self._weights(self.stage.slots[number])
            self.kept[number] = {name: value.clone() for name, value in now.items()}  # not views

    def load_kept(self, step: int, number: int) -> None:
        """Keep the adapter that the checkpoint after ``step`` steps has as the task's best."""
        slot = self.stage.slots[number]
        self.kept[number] = {}
        if self.is_writer:
            best = load_best(self.run.output_dir, step, slot.spec.name)
            self.kept[number] = {name: value.to(slot.weights.dtype) for name, value in best.items()}

    def export(self, present: Sequence[int], best: Sequence[int]) -> StorageError | None:
        """Write adapter folders: of some tasks as their adapters are now, of others those kept.

        Returns
        -------
        StorageError or None
            On rank 0, why an adapter could not be written; the others are.
        """
        failure = None
        for number in (*present, *best):
            beat("writing")
            slot = self.stage.slots[number]
            tensors = self.kept[number] if number in best else self._weights(slot)
            if self.is_writer:
                try:
                    self._write(slot, tensors)
                except StorageError as error:
                    failure = error
        if present or best:
            dist.barrier(group=self.control)
        return failure

    def _write(self, slot: Slot, tensors: dict[str, Tensor]) -> None:
        if bad := not_finite(tensors):
            log.warning(
                "the adapter of task %s holds values that are not finite (%s and %d more); "
                "it is of no use",
                slot.spec.name, bad[0], len(bad) - 1,
            )  # fmt: skip
        folder = self.run.adapter_folder(slot.spec.name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        with told_as_storage(folder, "then go on with --resume", size):
            save_adapter(folder, slot.spec, tensors, self.run.base_model)
