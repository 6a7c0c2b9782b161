"""A task ends after its own steps, bad gradients in a row, or a plateau."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from lobra.common.errors import Problems
from lobra.common.models import read_as
from lobra.tasks.config import TaskConfig
from lobra.trainer.task_progress import MAX_SKIPPED_IN_ROW, TaskProgress

TASK = TaskConfig("steady", 4, 8.0, ("q_proj",), 4, dataset_name="random", context_length=64)


def skip(progress: TaskProgress, times: int) -> list[str | None]:
    return [progress.record(math.nan, applied=False) for _ in range(times)]


def test_a_task_is_over_after_its_own_steps() -> None:
    progress = TaskProgress(num_steps=3)
    for left in (3, 2, 1):
        assert progress.steps_left == left
        assert progress.record(1.0, applied=True) is None
    assert progress.steps_left == 0
    progress.num_steps = 2  # as when a run goes on with fewer
    assert progress.steps_left == 0


def test_a_step_without_anything_to_learn_is_a_step() -> None:
    """Else the task would draw the same batch for ever."""
    progress = TaskProgress(num_steps=100)
    for _ in range(2 * MAX_SKIPPED_IN_ROW):
        assert progress.record(None, applied=False) is None
    assert progress == TaskProgress(num_steps=100, steps=2 * MAX_SKIPPED_IN_ROW)


def test_a_task_is_stopped_after_bad_gradients_in_a_row() -> None:
    progress = TaskProgress(num_steps=100)
    assert not any(skip(progress, MAX_SKIPPED_IN_ROW - 1))
    assert progress.record(1.0, applied=True) is None, "one good step starts the count anew"
    assert not any(skip(progress, MAX_SKIPPED_IN_ROW - 1))
    (message,) = skip(progress, 1)
    assert message is not None and "not finite" in message
    assert progress.steps_left == 0
    assert (progress.updates, progress.skipped) == (1, 2 * MAX_SKIPPED_IN_ROW - 1)
    assert progress.steps == 2 * MAX_SKIPPED_IN_ROW


def test_a_revived_task_starts_its_counts_anew() -> None:
    progress = TaskProgress(num_steps=100, best_loss=1.0)
    skip(progress, MAX_SKIPPED_IN_ROW)
    assert progress.steps_left == 0
    progress.revive()
    assert progress.steps_left == 100 - MAX_SKIPPED_IN_ROW, "it goes on where it was"
    assert not any(skip(progress, MAX_SKIPPED_IN_ROW - 1))
    assert progress.skipped == 2 * MAX_SKIPPED_IN_ROW - 1, "the total is kept"
    assert skip(progress, 1) != [None]


def test_periods_are_of_the_task_s_own_steps() -> None:
    progress = TaskProgress(num_steps=8)
    ends = []
    for step in range(1, 9):
        progress.record(1.0, applied=True)
        if progress.ends_period(3):
            ends.append(step)
    assert ends == [3, 6, 8]


def test_early_stopping_on_a_plateau() -> None:
    task = replace(TASK, early_stopping_patience=2, early_stopping_min_delta=0.1)
    progress = TaskProgress(num_steps=100)
    for loss in (3.0, 2.5, 2.45):  # the last improves by less than the minimum
        progress.record(loss, applied=True)
        assert progress.end_period(task, None) is None
    progress.record(2.44, applied=True)
    message = progress.end_period(task, None)
    assert message is not None and "training loss" in message
    for known in (progress, TaskProgress(3)):
        problems = Problems()
        assert read_as(TaskProgress, json.loads(json.dumps(known.as_json())), problems) == known
        assert not problems
    patient = TaskProgress(num_steps=100)
    for _ in range(50):
        patient.record(1.0, applied=True)
        assert patient.end_period(TASK, 1.0) is None, "patience 0 never stops"
