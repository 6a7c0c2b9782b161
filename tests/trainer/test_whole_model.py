"""A model that is trained whole is what transformers and torch make of it alone, in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, get_scheduler

from lobra.layout.placement import place as placed_anywhere
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import sample_indices, task_seed
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_family
from tests.trainer.alone import lift_to_double, padded
from tests.trainer.command import refused, train, write_config, write_plan
from tests.trainer.double import NoSinglePrecision
from tests.trainer.support import make_plan, make_run, random_dataset, steps_of

BAR = 1e-8
STEPS = 4
TASK = TaskConfig(
    "whole", 1, 1, TARGET_MODULES, 5, "random", 64, adapter="full", learning_rate=2e-3,
    weight_decay=0.1, max_grad_norm=0.5, lr_scheduler="cosine", warmup_steps=1,
)  # fmt: skip


def data_of() -> TokenizedDataset:
    return random_dataset(20, 6, 50, 256, 3)


def train_alone(base: Path, task: TaskConfig) -> tuple[Any, list[float]]:
    """Return transformers' model after the steps, and their losses."""
    data = data_of()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    lift_to_double(model)
    model.train()
    decayed = set(Trainer.get_decay_parameter_names(SimpleNamespace(), model))
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if (name in decayed) == decays],
            "weight_decay": task.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=task.learning_rate)
    scheduler = get_scheduler(task.lr_scheduler, optimizer, task.warmup_steps, STEPS)
    losses = []
    for step in range(STEPS):
        drawn = sample_indices(len(data), task.global_batch_size, task_seed(task), step)
        tokens, labels, mask = padded(data, drawn)
        optimizer.zero_grad()
        with NoSinglePrecision():
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), task.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return model, losses


def run_of(folder: Path, base: Path, layouts: list, **changes: Any) -> RunSpec:
    plan = make_plan(layouts, max_tokens=128)
    changes = {"precision": "fp64", "batching": "packed", **changes}
    return make_run(folder, base, (TASK,), [data_of()], plan, STEPS, **changes)


def assert_as_alone(run: RunSpec, base: Path) -> None:
    model, losses = train_alone(base, TASK)
    found = [step.tasks["whole"].loss for step in steps_of(run)]
    np.testing.assert_allclose(found, losses[-len(found) :], rtol=BAR)
    joint = AutoModelForCausalLM.from_pretrained(run.adapter_folder(0))
    assert joint.dtype == torch.float64
    trained = joint.state_dict()
    for name, expected in model.state_dict().items():
        error = (trained[name] - expected).norm() / expected.norm()
        assert error < BAR, f"{name}: relative error {error:.1e}"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "layouts"),
    [
        ("llama", [(1, 1), (1, 1)]),
        ("qwen3", [(2, 1)]),
        pytest.param("llama", [(1, 2)], marks=pytest.mark.long),
        pytest.param("llama", [(2, 2, "lean"), (2, 2, "lean")], marks=pytest.mark.long),
        pytest.param("qwen2", [(2, 1, "full"), (2, 1, "full")], marks=pytest.mark.long),
        pytest.param("gemma2", [(2, 1), (2, 1)], marks=pytest.mark.long),
        pytest.param("gemma3_text", [(2, 1)], marks=pytest.mark.long),
        pytest.param("granite", [(2, 2)], marks=pytest.mark.long),
        pytest.param("olmo2", [(2, 1), (2, 1)], marks=pytest.mark.long),
        pytest.param("mistral", [(2, 1)], marks=pytest.mark.long),
        pytest.param("gemma", [(2, 1)], marks=pytest.mark.long),
        pytest.param("phi3", [(2, 1), (2, 1)], marks=pytest.mark.long),
        pytest.param("glm", [(2, 1)], marks=pytest.mark.long),
        pytest.param("glm4", [(1, 2), (1, 2)], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_it_is_as_alone(family: str, layouts: list, tmp_path: Path) -> None:
    """Nothing is learned of the model's own padding token, which the data have, as in torch."""
    base = save_family(family, tmp_path / "base", pad_token_id=9)
    run = run_of(tmp_path / "run", base, layouts)
    run_local(run, "tests.trainer.double:train_in_double")
    assert_as_alone(run, base)


@pytest.mark.ranks
@pytest.mark.long
def test_it_goes_on_on_another_plan(tmp_path: Path) -> None:
    """Its files lie as the base's do, here in several; the optimiser's state is on the host."""
    base = save_family("llama", tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    half = run_of(tmp_path / "run", base, [(1, 1), (1, 1), (1, 1)], last_step=2)
    half = replace(half, tasks=(replace(TASK, offload=True),))
    run_local(half)
    plan = make_plan([(2, 1), (2, 1)], max_tokens=128)
    run = replace(
        half, plan=plan, world=placed_anywhere(plan, 1 << 20), last_step=STEPS, resume_step=2
    )
    run_local(run)
    assert_as_alone(run, base)
    names = [path.name for path in run.adapter_folder(0).glob("*.safetensors")]
    assert sorted(names) == sorted(path.name for path in base.glob("*.safetensors")) != []


@pytest.mark.ranks
def test_the_command_trains_what_fits_and_refuses_the_rest(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = {"dp": 1, "tp": 1, "pp": 1, "max_tokens": 64}
    write_config(adapter="full")
    assert train(place) == 2
    refused(capsys, "task[0].rank = 2: adapter: full trains no adapter")
    write_config(adapter="full", rank=None, lora_alpha=None, target_modules=None)
    write_plan(layout, {**layout, "tp": 4})
    assert train(place) == 2
    refused(capsys, "wants replicas that are all alike", "<4,1> has some of the 2 key heads")
    write_plan(layout)
    assert train(place, "--memory-budget", "100KB") == 2
    refused(capsys, "<1,1> x 1 in fp32 takes", "of the optimiser's", "there are 102 KB")
    assert train(place) == 0
    assert "all of its weights" in Path("run/adapters/small/README.md").read_text()
    AutoModelForCausalLM.from_pretrained("run/adapters/small")
