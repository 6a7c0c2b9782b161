"""Objectives other than supervised: joint equals TRL alone, on any plan, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_llama
from tests.trainer.support import make_plan, make_run, random_dataset, steps_of

BAR = 1e-8
MODULES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
STEPS = 3
EXAMPLES = 12
PARAMETERS = {
    "dpo": {"beta": 0.3},
    "cpo": {"beta": 0.2, "cpo_alpha": 0.7},
    "orpo": {"beta": 0.5},
    "kto": {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.6},
    "cit": {"contrast_weight": 5.0, "temperature": 0.3},
    "ppo": {"clip_low": 0.9, "clip_high": 1.3},
}


def examples(objective: str, seed: int) -> TokenizedDataset:
    """Random examples of two sequences; of ppo, sequences that a policy might have sampled."""
    data = random_dataset(2 * EXAMPLES, 6, 40, 256, seed)
    if objective == "ppo":
        generator = np.random.default_rng(seed)
        size, learned = len(data.tokens), data.labels >= 0
        logprobs = np.where(learned, generator.normal(-6, 0.7, size), 0.0)
        return replace(
            data, logprobs=logprobs, advantages=np.where(learned, generator.normal(size=size), 0.0)
        )
    signs = np.tile([1, 1 if objective == "cit" else -1], EXAMPLES)
    if objective == "kto":
        wanted = np.random.default_rng(seed).choice([1, -1], EXAMPLES)
        signs = np.stack([wanted, np.zeros(EXAMPLES)], axis=1).flatten()
    return replace(data, signs=signs.astype(np.int8))


def make_start(
    base: Path, folder: Path, seed: int, rank: int, modules: Sequence[str] = MODULES
) -> Path:
    """Save a fresh adapter of PEFT's with B that is not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(modules), task_type="CAUSAL_LM"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


def tasks_in(
    folder: Path,
    base: Path,
    objectives: Sequence[str] = tuple(PARAMETERS),
    modules: tuple[str, ...] = MODULES,
) -> tuple[TaskConfig, ...]:
    """A task of every one of these objectives, each with the adapter it starts from."""
    return tuple(
        TaskConfig(
            name=objective, rank=2 + seed, lora_alpha=2 * (2 + seed), target_modules=modules,
            global_batch_size=5, dataset_name="random", context_length=64, learning_rate=3e-3,
            max_grad_norm=0.3, objective=objective,
            resume_from=str(make_start(base, folder / objective, seed, 2 + seed, modules)),
            **PARAMETERS[objective],
        )
        for seed, objective in enumerate(objectives)
    )  # fmt: skip


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layouts",
    [
        [(1, 1), (1, 1), (2, 1), (1, 2)],
        pytest.param([(1, 1)], marks=pytest.mark.long),
        pytest.param([(2, 2, "lean"), (1, 1, "full")], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_joint_equals_trl_alone(layouts: list, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    tasks = tasks_in(tmp_path / "starts", base)
    data = [examples(task.objective, seed) for seed, task in enumerate(tasks)]
    plan = make_plan(layouts, max_tokens=112)
    run = make_run(tmp_path / "run", base, tasks, data, plan, STEPS, precision="fp64",
                   batching="packed")  # fmt: skip
    run_local(run, "tests.trainer.double:train_in_double")
    for number in range(len(tasks)):
        assert_as_with_trl(run, number, data[number])


def assert_as_with_trl(run: RunSpec, number: int, data: TokenizedDataset) -> None:
    """Assert that a task got the losses and the adapter that TRL's losses give it alone."""
    from tests.trainer.trl_alone import train_alone  # seconds: TRL, with trackers that it knows

    task = run.tasks[number]
    alone = train_alone(run.model_folder, task, data, Path(task.resume_from or ""), run.last_step)
    for step, loss, expected in zip(steps_of(run), alone["losses"], alone["metrics"], strict=True):
        found = step.tasks[task.name]
        assert found.loss == pytest.approx(loss, rel=BAR), task.name
        assert (found.preferences is None) == (task.objective == "ppo")
        for name, value in (found.preferences or {}).items():
            # TRL averages some in fp32.
            assert value == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    joint = load_file(run.adapter_folder(number) / "adapter_model.safetensors")
    for name, value in joint.items():
        expected = alone["tensors"][name]
        assert (value - expected).norm() / expected.norm() < BAR, f"{task.name} {name}"
