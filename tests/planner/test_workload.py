"""Whose lengths a task plans with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.planner.workload import make_workload
from lobra.tasks.config import TaskConfig, TrainerConfig

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
