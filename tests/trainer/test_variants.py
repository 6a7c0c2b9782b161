"""Every variant of an adapter and every optimiser, jointly on any plan, is what PEFT gets alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lobra.layout.placement import place
from lobra.layout.shapes import read_shape
from lobra.model.adapter import AdapterSpec, sites
from lobra.model.pissa import divided
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.adapters import adapter_spec, check_adapter, save_adapter
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_llama
from tests.trainer.alone import (
    ALL_LINEAR,
    STEPS,
    make_datasets,
    make_starts,
    peft_config,
    task_config,
    tasks_from,
    train_alone,
)
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import assert_same, final_tensors, losses_of, relative_errors

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
    task("lengths", adapter="dora", weight_decay=0.1, loraplus_ratio=3.0),
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
    run = train_in_two_parts(tmp_path / "run", base, tasks_from(starts, TASKS), data)
    assert_same(run, alone)
    for number, reference in enumerate(alone):
        ours = logits_of(base, run.adapter_folder(number))
        torch.testing.assert_close(ours, logits_of(base, reference["folder"]), rtol=1e-4, atol=1e-4)


def train_in_two_parts(
    folder: Path, base: Path, tasks: tuple[TaskConfig, ...], data: list[TokenizedDataset]
) -> RunSpec:
    """Train in fp64 on mixed layouts; go on from the checkpoint of step 2 on others."""
    plan = make_plan(list(BEFORE), max_tokens=128)
    run = make_run(folder, base, tasks, data, plan, STEPS, precision="fp64", last_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    plan = make_plan(list(AFTER), max_tokens=128)
    world = place(plan, 1 << 20)
    run = replace(run, plan=plan, world=world, last_step=STEPS, resume_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    return run


def test_what_is_exported_is_read_by_peft_and_by_us(base: Path, tmp_path: Path) -> None:
    shape = read_shape(base)
    for own in tasks_from(make_starts(base, tmp_path, TASKS), TASKS):
        assert own.resume_from is not None
        assert check_adapter(Path(own.resume_from), adapter_spec(own), shape) == []


@pytest.mark.parametrize("pattern", ["q_pro", "self_attn", "layers.4.self_attn.q_proj"])
def test_a_pattern_that_fits_nothing_is_told(base: Path, pattern: str) -> None:
    spec = AdapterSpec("x", 2, 2.0, ATTENTION, rank_pattern=((pattern, 3), ("v_proj", 4)))
    (problem,) = spec.problems(read_shape(base))
    assert problem.startswith(f"rank_pattern: {pattern!r} fits no linear")


PISSA = task("principal", adapter="pissa", alpha_pattern={"o_proj": 3.0}, lora_dropout=0.2)


def test_pissa_is_lora_on_what_its_start_leaves_of_the_base(base: Path, tmp_path: Path) -> None:
    """It starts as PEFT's; from there on PEFT trains LoRA on the base without that, in fp64."""
    tasks, data = (task_config(PISSA), task_config(TASKS[1])), make_datasets(2)
    run = train_in_two_parts(tmp_path / "run", base, tasks, data)
    trained, start = divided(final_tensors(run, 0))
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        replace(peft_config(PISSA), init_lora_weights="pissa"),
    )
    left = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    spec = adapter_spec(tasks[0])
    for site in sites(read_shape(base)):
        A, B = (start[tensor.name] for tensor in spec.tensors(site))
        weight = left.get_submodule(site.path).weight
        weight.data -= spec.scaling(site) * B @ A
        their_weight = theirs.base_model.model.get_submodule(site.path).base_layer.weight
        torch.testing.assert_close(weight.float(), their_weight, rtol=1e-5, atol=1e-6)
    left.save_pretrained(tmp_path / "left")
    plain = {**PISSA, "adapter": "lora"}
    folder = tmp_path / "starts" / "principal"
    folder.parent.mkdir()
    save_adapter(folder, replace(spec, kind="lora"), start, str(base))
    (alone,) = train_alone(
        tmp_path / "left", data, [folder], torch.float64, dropout=0.2, tasks=[plain]
    )
    for name, error in relative_errors(trained, alone["tensors"]).items():
        assert error < 1e-8, f"{name}: relative error {error:.1e}"
    np.testing.assert_allclose(losses_of(run, "principal"), alone["losses"][2:], rtol=1e-8)
    ours = logits_of(base, run.adapter_folder(0))
    expected = logits_of(tmp_path / "left", alone["folder"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def logits_of(base: Path, adapter: Path) -> torch.Tensor:
    """Return PEFT's logits of some tokens."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, adapter)(torch.arange(60).view(3, 20)).logits
