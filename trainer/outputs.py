"""What a run leaves behind: when adapters and checkpoints are due, and what could not be written.

What cannot be written is warned of and tried again: with the next checkpoint, and at the end.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial

from lobra.common.files import write_atomic
from lobra.common.storage import StorageError
from lobra.layout.order import StepOrder
from lobra.trainer.adapters import CARD_FILE
from lobra.trainer.checkpoint import CheckpointState
from lobra.trainer.evaluation import Evaluation
from lobra.trainer.live_run import LiveRun
from lobra.trainer.model_card import model_card
from lobra.trainer.records import Records
from lobra.trainer.save_times import SaveTimes

log = logging.getLogger(__name__)


class Outputs:
    """Orders a run's adapters and checkpoints.

    Attributes
    ----------
    save_times
        When checkpoints are due.
    evaluation
        Of the last step.
    best
        The tasks whose adapters of the last step are the best so far, and are to be kept.
    """

    def __init__(self, live: LiveRun, carry_out: Callable[..., object]) -> None:
        self.live = live
        self.save_times = SaveTimes(live.spec.save_every, live.spec.resume_step)
        self.evaluation = Evaluation()
        self.best: list[int] = []
        self._carry_out = carry_out
        self._unwritten: set[int] = set()  # tasks whose adapters could not be exported

    def write(
        self, state: Callable[[], CheckpointState], is_end: bool = False
    ) -> tuple[list[int], float]:
        """Keep and export what the last step has finished, and save if it is time to.

        A task that is over, by itself or with the run, is exported before a checkpoint says so.

        Parameters
        ----------
        state
            Returns the part of a checkpoint that is not tensors.
        is_end
            Whether no other step follows.

        Returns
        -------
        tuple
            The tasks that were exported, and the seconds it took.

        Raises
        ------
        StorageError
            At the end: something could not be written.
        """
        start = time.perf_counter()
        over, step = self.live.is_over, self.live.step
        save = self.save_times.is_due(step, over or is_end)
        if self.best:
            self._carry_out(StepOrder(step, keep=tuple(self.best)))
            self.best = []
        export = [
            number
            for number, task in self.live.tasks.items()
            if (over or not task.progress.steps_left) and not self.is_exported(number)
            if save or is_end or number not in self._unwritten
        ]
        failures = []
        for number in export:
            task = self.live.tasks[number].config
            name = f"the {task.trained} of task {task.name}"
            failures += _attempt(name, is_end, partial(self.export, number))
        tried = self._unwritten.union(export)
        self._unwritten = {number for number in tried if not self.is_exported(number)}
        if save:
            order = StepOrder(step, save=True)
            failed = _attempt(
                f"the checkpoint of step {step}", is_end, lambda: self._carry_out(order, state())
            )
            failures += failed
            if failed:
                self.save_times.failed()
            else:
                self.save_times.saved(step, time.perf_counter() - start)
        if is_end and failures:
            raise failures[0]
        return [n for n in export if n not in self._unwritten], time.perf_counter() - start

    def export(self, number: int) -> None:
        """Have a task's adapter written, the best that is kept or the present one.

        Raises
        ------
        StorageError
            It cannot be written.
        """
        best = self._is_best_kept(number)
        order = StepOrder(
            self.live.step,
            export=() if best else (number,),
            export_best=(number,) if best else (),
        )
        self._carry_out(order)
        progress = self.live.tasks[number].progress
        progress.exported_step = progress.steps

    def forget(self, number: int) -> None:
        """Try no more to write the adapter of a task that leaves."""
        self._unwritten.discard(number)

    def is_exported(self, number: int) -> bool:
        """Return whether a task's adapter lies in the run's folder as it is now."""
        task = self.live.tasks[number]
        there = self.live.spec.adapter_folder(task.config.name).is_dir()
        return there and task.progress.exported_step == task.progress.steps

    def _is_best_kept(self, number: int) -> bool:
        """Return whether the adapter that is kept is better than the present one.

        That a run ends is no end of a task's period: what is found then is not kept, so that the
        task does the same whether its run is interrupted or not.
        """
        progress = self.live.tasks[number].progress
        present_loss = self.evaluation.losses.get(number, math.inf)
        return progress.lowest_step is not None and progress.lowest_loss <= present_loss

    def tell(self, records: Records, numbers: Sequence[int]) -> None:
        """Tell of what was exported, and write the model cards."""
        spec = self.live.spec
        for number in numbers:
            task = self.live.tasks[number]
            folder = spec.adapter_folder(task.config.name)
            kept = spec.base_precision or spec.precision
            card = model_card(task.config, spec.base_model, kept, task.progress)
            try:
                write_atomic(folder / CARD_FILE, card)
            except OSError as error:
                log.warning("%s: has no model card: %s", folder, error)
            is_best = self._is_best_kept(number)
            records.tell_export(task.config, task.progress, folder, is_best)


def _attempt(what: str, is_end: bool, write: Callable[[], object]) -> list[StorageError]:
    """Write something; return why it cannot be written, which is warned of but at the end."""
    try:
        write()
    except StorageError as error:
        if not is_end:
            log.warning("%s is not written, the run goes on: %s", what, error)
        return [error]
    return []
