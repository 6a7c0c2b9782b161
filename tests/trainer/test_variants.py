"""Every variant of an adapter and every optimiser, jointly on any plan, is what PEFT gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lobra.layout.placement import place as placed_anywhere
from lobra.layout.shapes import read_shape
from lobra.model.adapter_checks import adapter_problems
from lobra.model.pissa import divided
from lobra.model.site import sites
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
from tests.trainer.command import refused, train, write_config
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import final_tensors, losses_of, relative_errors

ATTENTION = ALL_LINEAR[:4]
Record = Callable[[str, object], None]


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
    task("random", adapter="vera", rank=16, learning_rate=0.02, projection_prng_key=7),
    task(
        "gated", adapter="vera", target_modules=("v_proj", "o_proj", "down_proj"), lora_dropout=0.3,
        learning_rate=0.02, loraplus_ratio=2.0,
    ),
    task("descent", optimizer="sgd", loraplus_ratio=4.0, learning_rate=0.2, steps=4),
)  # fmt: skip


FRESH = (  # they start from the base, so not from an adapter of PEFT's
    task("principal", adapter="pissa", alpha_pattern={"o_proj": 3.0}, lora_dropout=0.2),
    task("long", adapter="dora", lora_dropout=0.2, steps=4),
)
BEFORE = ((1, 1), (1, 1), (2, 1), (1, 2))
AFTER = ((2, 2), (1, 1))
BAR = 1e-8


@dataclass(frozen=True)
class Joint:
    """All of them in one run, in fp64: two steps on mixed layouts, and the rest on others."""

    base: Path
    folder: Path
    starts: list[Path]
    data: list[TokenizedDataset]
    run: RunSpec


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> Joint:
    folder = tmp_path_factory.mktemp("variants")
    base, data = save_llama(folder / "base"), make_datasets(len(TASKS) + len(FRESH))
    starts = make_starts(base, folder / "starts", TASKS)
    tasks = (*tasks_from(starts, TASKS), *map(task_config, FRESH))
    plan = make_plan(list(BEFORE), max_tokens=128)
    run = make_run(folder / "run", base, tasks, data, plan, STEPS, precision="fp64", last_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    plan = make_plan(list(AFTER), max_tokens=128)
    world = placed_anywhere(plan, 1 << 20)
    run = replace(run, plan=plan, world=world, last_step=STEPS, resume_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    return Joint(base, folder, starts, data, run)


@pytest.mark.parametrize("number", range(len(TASKS)), ids=lambda number: str(TASKS[number]["name"]))
def test_each_is_as_alone(joint: Joint, number: int, record_property: Record) -> None:
    own = dict(numbers=[number], tasks=TASKS)
    (alone,) = train_alone(joint.base, joint.data, joint.starts, torch.float64, **own)
    error = assert_as_alone(joint, number, final_tensors(joint.run, number), alone)
    record_property("largest_relative_error", f"{error:.1e}")
    ours = logits_of(joint.base, joint.run.adapter_folder(number))
    torch.testing.assert_close(ours, logits_of(joint.base, alone["folder"]), rtol=1e-4, atol=1e-4)
    own_config = joint.run.tasks[number]
    for folder in (joint.starts[number], joint.run.adapter_folder(number)):
        assert check_adapter(folder, adapter_spec(own_config), read_shape(joint.base)) == []


def assert_as_alone(joint: Joint, number: int, tensors: dict, alone: dict) -> float:
    """Return the largest relative error of a tensor."""
    errors = relative_errors(tensors, alone["tensors"])
    for name, error in errors.items():
        assert error < BAR, f"{name}: relative error {error:.1e}"
    losses = losses_of(joint.run, joint.run.tasks[number].name)
    np.testing.assert_allclose(losses, alone["losses"][2:], rtol=BAR, atol=0)
    return max(errors.values())


def test_dora_starts_from_the_lengths_of_rows(
    joint: Joint, tmp_path: Path, record_property: Record
) -> None:
    """A fresh one, with dropout; PEFT is given our A."""
    number, own = len(TASKS) + 1, FRESH[1]
    plain = AutoModelForCausalLM.from_pretrained(joint.base, dtype=torch.float64)
    model = get_peft_model(plain, peft_config(own, read_shape(joint.base)))
    spec = adapter_spec(joint.run.tasks[number])
    for site in sites(read_shape(joint.base)):
        if tensors := spec.tensors(site):
            A = tensors[0].start().double()
            model.base_model.model.get_submodule(site.path).lora_A["default"].weight.data = A
    model.save_pretrained(tmp_path / "long")
    (alone,) = train_alone(
        joint.base, joint.data, {number: tmp_path / "long"}, torch.float64,
        tasks=[*TASKS, *FRESH], numbers=[number],
    )  # fmt: skip
    error = assert_as_alone(joint, number, final_tensors(joint.run, number), alone)
    record_property("largest_relative_error", f"{error:.1e}")


def test_pissa_is_lora_on_what_its_start_leaves_of_the_base(
    joint: Joint, tmp_path: Path, record_property: Record
) -> None:
    """It starts as PEFT's; from there on PEFT trains LoRA on the base without that, in fp64."""
    number = len(TASKS)
    alone, errors = pissa_alone(joint.run, number, [*TASKS, *FRESH], tmp_path)
    assert max(errors.values()) < BAR, errors
    losses = losses_of(joint.run, joint.run.tasks[number].name)
    np.testing.assert_allclose(losses, alone["losses"][2:], rtol=BAR, atol=0)
    record_property("largest_relative_error", f"{max(errors.values()):.1e}")
    ours = logits_of(joint.base, joint.run.adapter_folder(number))
    expected = logits_of(tmp_path / "left", alone["folder"])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def pissa_alone(
    run: RunSpec, number: int, tasks: Sequence[dict], folder: Path
) -> tuple[dict, dict[str, float]]:
    """Return what PEFT gets on what a task's start left of the base, and the tensors' errors."""
    base, shape = run.model_folder, read_shape(run.model_folder)
    trained, start = divided(final_tensors(run, number))
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        replace(peft_config(tasks[number], shape), init_lora_weights="pissa"),
    )
    left = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    spec = adapter_spec(run.tasks[number])
    spec = replace(spec, target_modules=shape.own_modules(spec.target_modules))
    for site in sites(shape):
        if tensors := spec.tensors(site):
            A, B = (start[tensor.name] for tensor in tensors)
            weight = left.get_submodule(site.path).weight
            weight.data -= spec.scaling(site) * B @ A
            their_weight = theirs.base_model.model.get_submodule(site.path).base_layer.weight
            torch.testing.assert_close(weight.float(), their_weight, rtol=1e-5, atol=1e-6)
    left.save_pretrained(folder / "left")
    save_adapter(folder / "principal", replace(spec, kind="lora"), start, str(base))
    (alone,) = train_alone(
        folder / "left", make_datasets(len(tasks)), {number: folder / "principal"},
        torch.float64, tasks=tasks, numbers=[number],
    )  # fmt: skip
    return alone, relative_errors(trained, alone["tensors"])


def logits_of(base: Path, adapter: Path) -> torch.Tensor:
    """Return PEFT's logits of some tokens."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(plain, adapter)(torch.arange(60).view(3, 20)).logits


@pytest.mark.parametrize("pattern", ["q_pro", "self_attn", "layers.4.self_attn.q_proj"])
def test_a_pattern_that_fits_nothing_is_told(joint: Joint, pattern: str) -> None:
    fields = task("x", target_modules=ATTENTION, rank_pattern={pattern: 3, "v_proj": 4})
    (problem,) = adapter_problems(task_config(fields), read_shape(joint.base))
    assert problem.startswith(f"rank_pattern: {pattern!r} fits nothing")


def test_what_a_model_is_not_made_for_is_refused_at_once(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter="pissa", rank=40, rank_pattern={"o_proj": 2}, target_modules=["k_proj"])
    assert train(place) == 2
    refused(capsys, "rank_pattern: 'o_proj' fits nothing", "rank: 40 is more than", "at most 32")
