"""Every variant of an adapter and every optimiser, jointly on any plan, is what PEFT gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lobra.layout.placement import place
from lobra.layout.shapes import read_shape
from lobra.model.adapter import AdapterSpec
from lobra.trainer.adapters import adapter_spec, check_adapter
from lobra.trainer.run import run_local
from tests.model.support import save_llama
from tests.trainer.alone import (
    ALL_LINEAR,
    STEPS,
    make_datasets,
    make_starts,
    tasks_from,
    train_alone,
)
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import assert_same

ATTENTION = ALL_LINEAR[:4]


def task(name: str, **fields: Any) -> dict[str, Any]:
    plain = dict(
        name=name, rank=4, lora_alpha=6, target_modules=ALL_LINEAR, global_batch_size=3,
        learning_rate=2e-3, max_grad_norm=0.5,
    )  # fmt: skip
    return {**plain, **fields}


TASKS = (
    task(
        "stable", adapter="rslora", target_modules=ATTENTION,
        rank_pattern={"q_proj": 2, r"layers.[01].self_attn.v_proj": 6},
        alpha_pattern={r"layers\.3\..*": 3.0},
        adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, weight_decay=0.2,
    ),
    task("plus", loraplus_ratio=8.0, weight_decay=0.1, rank_pattern={"down_proj": 1}),
    task("momentum", optimizer="sgd", momentum=0.7, weight_decay=0.05, learning_rate=0.3),
    task("descent", optimizer="sgd", loraplus_ratio=4.0, learning_rate=0.2, steps=4),
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("variants") / "base")


BEFORE = ((1, 1), (1, 1), (2, 1), (1, 2))
AFTER = ((2, 2), (1, 1))


def test_all_together_are_each_as_alone(base: Path, tmp_path: Path) -> None:
    """On mixed layouts, with a checkpoint on the way that goes on on others."""
    data, starts = make_datasets(len(TASKS)), make_starts(base, tmp_path / "starts", TASKS)
    alone = train_alone(base, data, starts, torch.float64, tasks=TASKS)
    tasks, plan = tasks_from(starts, TASKS), make_plan(list(BEFORE), max_tokens=128)
    run = make_run(tmp_path / "run", base, tasks, data, plan, STEPS, precision="fp64", last_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    plan = make_plan(list(AFTER), max_tokens=128)
    world = place(plan, 1 << 20)
    run = replace(run, plan=plan, world=world, last_step=STEPS, resume_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    assert_same(run, alone)


def test_what_is_exported_is_read_by_peft_and_by_us(base: Path, tmp_path: Path) -> None:
    shape = read_shape(base)
    for own in tasks_from(make_starts(base, tmp_path, TASKS), TASKS):
        assert own.resume_from is not None
        assert check_adapter(Path(own.resume_from), adapter_spec(own), shape) == []


@pytest.mark.parametrize("pattern", ["q_pro", "self_attn", "layers.4.self_attn.q_proj"])
def test_a_pattern_that_fits_nothing_is_told(base: Path, pattern: str) -> None:
    spec = AdapterSpec("x", 2, 2.0, ATTENTION, rank_pattern=((pattern, 3), ("v_proj", 4)))
    assert spec.unused_patterns(read_shape(base)) == [("rank_pattern", pattern)]
