"""Writing a model that is trained whole: gathered from the ranks that hold it, file by file.

One file's tensors are in memory at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from lobra.common.storage import StorageError
from lobra.model.base_linear import row_numbers
from lobra.model.heartbeat import beat
from lobra.model.held import HeldTensor, Size, held_tensors, owned_tensors
from lobra.model.precision import kept_dtype
from lobra.model.stage import Stage
from lobra.trainer.adapters import not_finite
from lobra.trainer.checkpoint import CheckpointState, CheckpointWriter
from lobra.trainer.exporter import AdapterExporter
from lobra.trainer.folder_writer import FolderWriter
from lobra.trainer.model_folder import Files, describe
from lobra.trainer.model_optimizer import ModelOptimizer
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.zero import MASTER

log = logging.getLogger(__name__)


class ModelExporter(AdapterExporter):
    """In the place of the adapters' exporter. All methods are collective."""

    optimizer: ModelOptimizer

    def __init__(
        self,
        run: RunSpec,
        stage: Stage,
        optimizer: ModelOptimizer,
        control_group: dist.ProcessGroup,
        files: Files,
    ) -> None:
        super().__init__(run, stage, optimizer, control_group)
        self.files = files
        sizes = {name: size for own in files.values() for name, size in own.items()}
        self.sources = {
            block.holders[0]: _places(run, stage, sizes, block.holders[0])
            for block in run.world.shard_blocks(stage.shape.num_layers)
        }

    def save_checkpoint(self, state: CheckpointState | None) -> StorageError | None:
        """Write the checkpoint of `state` (None but on rank 0): the optimiser's state."""
        name = self.run.tasks[0].name
        writer = None
        if state is not None:
            writer = CheckpointWriter(self.run.output_dir, state.step, self._checkpoint_bytes())
        kinds = (MASTER, *self.optimizer.moment_names(0))
        for kind in kinds:
            dist.barrier(group=self.control)  # whose patience is long
            flat = self.optimizer.whole(kind)
            folder = Path("adapters", name) if kind == MASTER else Path("moments", name, kind)
            self._write_files(folder, flat, kept_dtype(self.stage.dtype), writer)
        failure = None
        try:
            if writer is not None and state is not None:
                precision = "fp64" if self.run.precision == "fp64" else "fp32"
                self._describe(writer, Path("adapters", name), precision)
                writer.finish(state, self.run.keep_checkpoints)
        except StorageError as error:
            failure = error
        dist.barrier(group=self.control)
        return failure

    def export(self, present: Sequence[int], best: Sequence[int]) -> StorageError | None:
        """Write the model's folder as it is now; return on rank 0 why it could not be written."""
        assert not best, "of a whole model none is kept as the best"
        failure = None
        for number in present:
            writer = None
            if self.is_writer:
                target = self.run.adapter_folder(number)
                writer = FolderWriter(target, "then go on with --resume")
            self._write_files(Path(), self.optimizer.trained.weights, self.stage.dtype, writer)
            try:
                if writer is not None:
                    self._describe(writer, Path(), self.run.precision)
                    writer.show()
            except StorageError as error:
                failure = error
            dist.barrier(group=self.control)
        return failure

    def _describe(self, writer: FolderWriter, folder: Path, precision: str) -> None:
        base = self.run.model_folder
        writer.add(lambda draft: describe(draft / folder, base, self.files, precision))

    def _write_files(
        self, folder: Path, flat: Tensor | None, dtype: torch.dtype, writer: FolderWriter | None
    ) -> None:
        """Write files of tensors below a writer's folder; ``flat`` is what a source has of them."""
        for file, tensors in self._gathered(flat, dtype):
            if writer is None:
                continue
            if bad := not_finite(tensors):
                log.warning(
                    "%s: the model holds values that are not finite (%s and %d more); it is of no "
                    "use",
                    file, bad[0], len(bad) - 1,
                )  # fmt: skip

            def save(
                draft: Path, file: str = file, tensors: Mapping[str, Tensor] = tensors
            ) -> None:
                (draft / folder).mkdir(parents=True, exist_ok=True)
                save_file(dict(tensors), draft / folder / file, metadata={"format": "pt"})

            writer.add(save)

    def _gathered(
        self, flat: Tensor | None, dtype: torch.dtype
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield each file's tensors, whole on rank 0, elsewhere empty."""
        rank = dist.get_rank()
        for file, sizes in self.files.items():
            beat("writing")
            found = {}
            for name, size in sizes.items():
                whole = torch.empty(size if self.is_writer else 0, dtype=dtype)
                for source, places in self.sources.items():
                    if name not in places or rank not in (0, source):
                        continue
                    place, tensor = places[name]
                    if rank == source:
                        assert flat is not None, "a source holds its shard"
                        part = flat[place].to("cpu", dtype).view(tensor.held_size)
                    else:
                        part = torch.empty(tensor.held_size, dtype=dtype)
                        dist.recv(part, source, group=self.control)
                    if self.is_writer:
                        rows = row_numbers(tensor.stored_rows, tensor.fused)
                        whole[:, *tensor.parts[1:]][rows] = part
                    else:
                        dist.send(part.contiguous(), 0, group=self.control)
                found[name] = whole
            yield file, found

    def _checkpoint_bytes(self) -> int:
        numel = sum(
            torch.Size(size).numel() for own in self.files.values() for size in own.values()
        )
        kinds = 1 + len(self.optimizer.moment_names(0))
        return numel * kinds * kept_dtype(self.stage.dtype).itemsize


def _places(
    run: RunSpec, stage: Stage, sizes: Mapping[str, Size], rank: int
) -> dict[str, tuple[slice, HeldTensor]]:
    """Return where the tensors that a rank keeps lie in its flat weights."""
    place = run.world.place(rank)
    found, start = {}, 0
    for tensor in owned_tensors(held_tensors(sizes, stage.shape, place), place):
        found[tensor.name] = slice(start, start + tensor.numel), tensor
        start += tensor.numel
    return found
