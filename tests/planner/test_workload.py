"""Whose lengths a task plans with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.expected_batch import expect
from lobra.planner.workload import Workload, make_workload, token_shares
from lobra.tasks.config import TaskConfig
from lobra.tasks.task_file import TrainerConfig
from tests.trainer.support import random_dataset

LENGTHS = {"a": np.arange(1, 11), "b": np.arange(101, 104), "named": np.array([7])}


def lengths_of(name: str, dataset_name: str | tuple[str, ...], **fields: Any) -> list[int]:
    task = TaskConfig(name, 4, 8, ("q_proj",), 4, dataset_name, 512, steps=5, **fields)
    config = TrainerConfig("c", "canonical", (task,), Path("c.json"))
    return list(make_workload(config, LENGTHS, 512).lengths[name])


def test_the_tasks_own_lengths_come_first() -> None:
    assert lengths_of("named", "a") == [7]
    assert lengths_of("other", "a") == list(range(1, 11))


def test_several_data_sets_one_after_another() -> None:
    assert lengths_of("t", ("b", "a")) == [101, 102, 103, *range(1, 11)]
    assert lengths_of("t", ("a", "b"), max_samples=2) == [1, 2, 101, 102]
    with pytest.raises(ConfigError, match="data set 'a', 'nowhere'"):
        lengths_of("t", ("a", "nowhere"))


def test_what_is_held_out_is_not_trained_but_must_fit() -> None:
    task = TaskConfig("a", 4, 8, ("q_proj",), 4, "a", 512, epochs=3, validation_split=0.3)
    config = TrainerConfig("c", "canonical", (task,), Path("c.json"))
    for seed in range(6):
        work = make_workload(config, LENGTHS, 512, seed)
        assert len(work.lengths["a"]) == 7 and len(work.held_out["a"]) == 3
        assert sorted([*work.lengths["a"], *work.held_out["a"]]) == list(range(1, 11))
        assert work.longest == 10
        assert work.num_steps == {"a": 6}  # 21 sequences, four a step
        assert len(list(work.steps(50))) == 6
    long = {"a": np.array([100] * 9 + [500])}
    batches = [expect(make_workload(config, long, 512, seed), 4) for seed in range(6)]
    assert all(batch.buckets[-1] == 512 and batch.counts[-1] >= 1 for batch in batches)


def test_a_step_asks_for_what_its_tasks_do_with_their_tokens() -> None:
    """Tasks with a reference compute it before, an adapter on the head its logits twice."""
    fields = {"a": {"objective": "dpo"}, "b": {"objective": "kto"}, "c": {}}
    tasks = tuple(
        TaskConfig(name, 4, 8, ("q_proj", "lm_head"), 4, name, 512, **own)
        for name, own in fields.items()
    )
    data = [random_dataset(12, 8, 40, 64, seed) for seed in range(3)]
    data[:2] = [replace(own, signs=np.tile([1, -1], 6).astype(np.int8)) for own in data[:2]]
    found = token_shares(tasks, data)
    tokens, labels = (
        np.array([size * 4 / own.num_examples for own, size in zip(data, sizes, strict=True)])
        for sizes in ([len(own.tokens) for own in data], [own.num_labels for own in data])
    )
    assert found.labels == pytest.approx(labels.sum() / tokens.sum())
    assert found.passes_before == pytest.approx(tokens @ [1, 0.5, 0] / tokens.sum())
    assert found.logits_again == pytest.approx(labels @ [2, 1.5, 1] / labels.sum())
    assert token_shares(tasks[2:], data[2:]).passes_before == 0


def test_a_task_alone_draws_what_it_draws_among_others() -> None:
    tasks = tuple(
        TaskConfig(name, 4, 8, ("q_proj",), 4, name, 512, steps=steps, seed=steps)
        for name, steps in (("a", 2), ("b", 5))
    )
    work = make_workload(TrainerConfig("c", "canonical", tasks, Path("c.json")), LENGTHS, 512, 7)
    for step in range(6):
        drawn = work.draw(step)
        assert drawn.keys() == {name for name, end in (("a", 2), ("b", 5)) if step < end}
        for name, indices in drawn.items():
            assert (work.only(name).draw(step)[name] == indices).all()


def test_steps_draw_every_sequence_once_per_epoch() -> None:
    work = Workload({"a": np.arange(1, 13)}, {"a": 4}, {"a": 0})
    drawn = np.concatenate(list(work.steps(3)))
    assert sorted(drawn.tolist()) == list(range(1, 13))
