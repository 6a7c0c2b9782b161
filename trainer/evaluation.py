"""Validation: the loss of the sequences that `validation_split` holds out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lobra.layout.order import StepOrder
from lobra.layout.sequences import Sequence
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import all_sequences
from lobra.trainer.run_spec import RunSpec


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes
    ----------
    losses
        By task its mean loss per target token; without the tasks that have nothing held out.
    memory_bytes
        Of every rank its peak since the step before; empty where there was nothing to evaluate.
    time_s
        What it took.
    """

    losses: Mapping[int, float] = field(default_factory=dict)
    memory_bytes: tuple[int, ...] = ()
    time_s: float = 0.0


def held_out_data(run: RunSpec, name: str) -> TokenizedDataset | None:
    """Return what a task of a run holds out, None if that is nothing."""
    folder = run.validation_folder(name)
    return TokenizedDataset.load(folder) if folder.is_dir() else None


class HeldOut:
    """The tasks' held-out sequences, and the order that evaluates those of some of them.

    An order is kept for as long as the same tasks are asked for: the sequences are always the same.
    """

    def __init__(
        self,
        run: RunSpec,
        tasks: Mapping[int, TaskConfig],
        dispatch: Callable[[list[Sequence]], StepOrder],
    ) -> None:
        self.tasks = tasks
        found = {number: held_out_data(run, task.name) for number, task in tasks.items()}
        self.data = {number: data for number, data in found.items() if data is not None}
        self.dispatch = dispatch
        self._kept: tuple[tuple[int, ...], StepOrder] | None = None

    def order(self, tasks: tuple[int, ...]) -> StepOrder | None:
        """Return the order that evaluates these tasks; None where they have nothing held out."""
        tasks = tuple(task for task in tasks if task in self.data)
        if not tasks:
            return None
        if self._kept is None or self._kept[0] != tasks:
            sequences = [
                s for task in tasks for s in all_sequences(task, self.tasks[task], self.data[task])
            ]
            self._kept = (tasks, self.dispatch(sequences))
        return self._kept[1]
