"""Eight tasks of eight kinds in one run, on mixed layouts: each gets what it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lobra.trainer.run import run_local
from tests.model.support import save_llama
from tests.trainer.alone import STEPS, make_datasets, make_starts, tasks_from, train_alone
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import final_tensors, losses_of, relative_errors
from tests.trainer.test_preferences import MODULES, assert_as_with_trl, examples, tasks_in
from tests.trainer.test_variants import task

BAR = 1e-8
SUPERVISED = (
    task("lora"),
    task("rslora", adapter="rslora"),
    task("dora", adapter="dora"),
    task("vera", adapter="vera", rank=16, learning_rate=0.02),
    task("plus", loraplus_ratio=8.0),
    task("head", target_modules=("lm_head",)),
)
COMPARING = ("dpo", "kto")


@pytest.mark.ranks
@pytest.mark.long
def test_eight_kinds_at_once_are_each_as_alone(tmp_path: Path) -> None:
    base, data = save_llama(tmp_path / "base"), make_datasets(len(SUPERVISED))
    starts = make_starts(base, tmp_path / "starts", SUPERVISED)
    tasks = (
        *tasks_from(starts, SUPERVISED),
        *tasks_in(tmp_path / "starts", base, COMPARING, (*MODULES, "lm_head")),
    )
    data += [examples(objective, seed) for seed, objective in enumerate(COMPARING)]
    plan = make_plan([(1, 1), (1, 1), (2, 1), (1, 2)], max_tokens=128)
    run = make_run(tmp_path / "run", base, tasks, data, plan, STEPS, precision="fp64")
    run_local(run, "tests.trainer.double:train_in_double")
    alone = train_alone(base, data, starts, torch.float64, tasks=SUPERVISED)
    for number, (own, expected) in enumerate(zip(SUPERVISED, alone, strict=True)):
        errors = relative_errors(final_tensors(run, number), expected["tensors"])
        assert max(errors.values()) < BAR, own["name"]
        assert losses_of(run, own["name"]) == pytest.approx(expected["losses"], rel=BAR)
    for number in range(len(SUPERVISED), len(tasks)):
        assert_as_with_trl(run, number, data[number])
