"""What other tenants' tasks change in an adapter: the order of sums, so its rounding alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.run import run_local
from tests.model.support import save_llama
from tests.trainer.support import make_plan, make_run, random_dataset
from tests.trainer.test_equality import parts, relative_errors

#: Of every tensor after six steps, in fp64. On an AMD EPYC the largest difference is 1.5e-15.
BAR = 1e-12
OWN = TaskConfig(
    "own", 4, 8.0, TARGET_MODULES, 5, "random", 64, learning_rate=1e-2, lora_dropout=0.1,
    weight_decay=0.1,
)  # fmt: skip
OTHERS = (
    replace(OWN, name="other", rank=8, global_batch_size=7),
    replace(OWN, name="third", target_modules=("q_proj", "up_proj"), global_batch_size=1),
)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "target", ["lobra.trainer.rank:train_rank", "tests.trainer.faults:train_joined"]
)
def test_others_change_an_adapter_by_rounding_alone(target: str, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", num_hidden_layers=2)
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(3)]
    plan = make_plan([(1, 1), (2, 1)], 64)
    adapters = []
    for tasks in ((OWN,), (*OTHERS, OWN)):
        own_data = [data[0]] if len(tasks) == 1 else [*data[1:], data[0]]
        run = make_run(tmp_path / str(len(tasks)), base, tasks, own_data, plan, 6, precision="fp64")
        run_local(run, target)
        adapters.append(load_file(run.adapter_folder(len(tasks) - 1) / "adapter_model.safetensors"))
    alone, among_others = adapters
    assert {value.dtype for value in alone.values()} == {torch.float64}
    assert max(parts(relative_errors(among_others, alone)).values()) < BAR
