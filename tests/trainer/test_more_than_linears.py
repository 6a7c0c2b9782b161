"""Adapters on head and embedding, and trained norms and biases: joint is what PEFT gets alone.

In fp64, as `tests.trainer.test_equality` explains. The adapters that tasks start from are PEFT's
own files, in which it also saves the base's embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobra.layout.placement import place as placed_anywhere
from lobra.layout.shapes import read_shape
from lobra.model.adapter_checks import adapter_problems
from lobra.model.checkpoint import CheckpointReader
from lobra.model.flat_tensors import FlatTensors
from lobra.trainer.adapters import adapter_spec, check_adapter, save_adapter
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import FAMILIES, save_family
from tests.trainer.alone import (
    ALL_LINEAR,
    STEPS,
    make_datasets,
    make_starts,
    task_config,
    tasks_from,
    train_alone,
)
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import final_tensors, losses_of, relative_errors
from tests.trainer.test_variants import logits_of, pissa_alone, task

BAR = 1e-8
LAYOUTS: list[tuple[Any, ...]] = [(1, 1), (2, 1, "lean"), (1, 2, "full")]
Record = Callable[[str, object], None]

HEAD = task("head", target_modules=("lm_head",), weight_decay=0.1)
WORDS = task(
    "words", target_modules=(*ALL_LINEAR, "embed_tokens"), adapter="rslora",
    rank_pattern={"embed_tokens": 3}, alpha_pattern={"embed_tokens": 9},
)  # fmt: skip
PLUS = task(
    "plus", target_modules=(*ALL_LINEAR, "lm_head"), loraplus_ratio=4.0, lora_dropout=0.3,
    modules_to_save=["input_layernorm"],
)  # fmt: skip
ROWS = task("rows", target_modules=(*ALL_LINEAR, "lm_head"), adapter="dora", lora_dropout=0.2)
GATES = task("gates", target_modules=ALL_LINEAR, adapter="vera", rank=16, learning_rate=0.02)
ENDS = task("ends", target_modules=("o_proj", "embed_tokens", "lm_head"), modules_to_save=["norm"])
EVERYWHERE = (HEAD, WORDS, PLUS, ROWS, GATES, ENDS)
ALL_BIASES = task("biases", target_modules=("v_proj", "o_proj"), bias="all")
OWN_BIASES = task("own", target_modules=("q_proj", "o_proj"), bias="lora_only", adapter="dora")
HEAD_GATES = task("scaled", target_modules=("lm_head", "q_proj"), adapter="vera")
CASES = {
    "llama": (*EVERYWHERE, HEAD_GATES),
    "mistral": EVERYWHERE,
    "qwen2": (*EVERYWHERE, ALL_BIASES, OWN_BIASES),
    "qwen3": EVERYWHERE,
    "gemma": EVERYWHERE,
    "gemma2": EVERYWHERE,
    "gemma3_text": EVERYWHERE,
    "granite": (*EVERYWHERE, ALL_BIASES, OWN_BIASES),
    "phi3": EVERYWHERE,
    "glm": (*EVERYWHERE, ALL_BIASES, OWN_BIASES),
    "glm4": EVERYWHERE,
    "olmo2": EVERYWHERE,
}


def joint_run(
    family: str, tasks: tuple[dict[str, Any], ...], folder: Path, layouts: list[tuple[Any, ...]]
) -> tuple[RunSpec, list[Path]]:
    """Train two steps on these layouts, and the rest, from a checkpoint, on others."""
    base = save_family(family, folder / "base", pad_token_id=9)
    starts = make_starts(base, folder / "starts", tasks)
    data, plan = make_datasets(len(tasks)), make_plan(layouts, max_tokens=128)
    run = make_run(
        folder / "run", base, tasks_from(starts, tasks), data, plan, STEPS, precision="fp64",
        last_step=2,
    )  # fmt: skip
    run_local(run, "tests.trainer.double:train_in_double")
    plan = make_plan([(2, 2)], max_tokens=128)
    world = placed_anywhere(plan, 1 << 20)
    run = replace(run, plan=plan, world=world, last_step=STEPS, resume_step=2)
    run_local(run, "tests.trainer.double:train_in_double")
    return run, starts


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("family", "tasks"),
    [
        pytest.param("qwen2", (PLUS, ENDS, OWN_BIASES), id="some-qwen2"),
        *(pytest.param(*case, marks=pytest.mark.long, id=case[0]) for case in CASES.items()),
    ],
)
def test_each_is_as_alone(
    family: str, tasks: tuple[dict[str, Any], ...], tmp_path: Path, record_property: Record
) -> None:
    run, starts = joint_run(family, tasks, tmp_path, LAYOUTS)
    data, largest = make_datasets(len(tasks)), 0.0
    for number, own in enumerate(tasks):
        (alone,) = train_alone(
            run.model_folder, data, starts, torch.float64, tasks=tasks, numbers=[number]
        )
        errors = relative_errors(final_tensors(run, number), alone["tensors"])
        for name, error in errors.items():
            assert error < BAR, f"{own['name']} {name}: relative error {error:.1e}"
        assert losses_of(run, own["name"]) == pytest.approx(alone["losses"][2:], rel=BAR)
        largest = max(largest, *errors.values())
        ours = logits_of(run.model_folder, run.adapter_folder(number))
        theirs = logits_of(run.model_folder, alone["folder"])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        spec, shape = adapter_spec(run.tasks[number]), read_shape(run.model_folder)
        for folder in (starts[number], run.adapter_folder(number)):
            assert check_adapter(folder, spec, shape) == []
    record_property("largest_relative_error", f"{largest:.1e}")


@pytest.mark.ranks
@pytest.mark.long
def test_losses_in_bf16_are_near(tmp_path: Path) -> None:
    tasks = CASES["qwen2"]
    base, data = save_family("qwen2", tmp_path / "base"), make_datasets(len(tasks))
    starts = make_starts(base, tmp_path / "starts", tasks)
    plan = make_plan(LAYOUTS, max_tokens=128)
    run = make_run(
        tmp_path / "run", base, tasks_from(starts, tasks), data, plan, STEPS, precision="bf16"
    )
    run_local(run)
    for own, alone in zip(
        tasks, train_alone(base, data, starts, torch.float64, tasks=tasks), strict=True
    ):
        assert losses_of(run, own["name"]) == pytest.approx(alone["losses"], rel=1e-2)


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_pissa_is_as_alone(family: str, tmp_path: Path) -> None:
    """PEFT trains LoRA on what the start leaves of the base; it is PEFT's own start."""
    base, data = save_family(family, tmp_path / "base"), make_datasets(1)
    tasks = (task("principal", adapter="pissa", rank=3, lora_dropout=0.2),)
    plan = make_plan(LAYOUTS, max_tokens=128)
    run = make_run(
        tmp_path / "run", base, tuple(map(task_config, tasks)), data, plan, STEPS, precision="fp64"
    )
    run_local(run, "tests.trainer.double:train_in_double")
    alone, errors = pissa_alone(run, 0, tasks, tmp_path)
    assert max(errors.values()) < BAR, errors
    assert losses_of(run, "principal") == pytest.approx(alone["losses"], rel=BAR)


@pytest.mark.ranks
def test_fresh_ones_start_as_peft_s(tmp_path: Path) -> None:
    """Norms and biases from the base's, and those of the embedding as PEFT begins them."""
    base, data = save_family("qwen2", tmp_path / "base"), make_datasets(1)
    tasks = (
        task(
            "fresh", target_modules=("embed_tokens", "lm_head", "o_proj"), bias="all",
            modules_to_save=["norm"], adapter="rslora",
        ),
    )  # fmt: skip
    plan = make_plan([(2, 1), (1, 2)], max_tokens=128)
    run = make_run(
        tmp_path / "run", base, tuple(map(task_config, tasks)), data, plan, STEPS, precision="fp64"
    )
    run_local(run, "tests.trainer.double:train_in_double")
    spec, shape = adapter_spec(run.tasks[0]), read_shape(base)
    reader = CheckpointReader(base, torch.float64, torch.device("cpu"))
    start = {
        tensor.name: reader.read(tensor.base_name)
        if tensor.from_base
        else tensor.as_peft(tensor.start()).contiguous()
        for tensor in FlatTensors.whole(spec, shape).tensors
    }
    (A,) = (value for name, value in start.items() if name.endswith("lora_embedding_A"))
    (B,) = (value for name, value in start.items() if name.endswith("lora_embedding_B"))
    assert not A.any() and float(B.std()) == pytest.approx(1.0, abs=0.1)
    save_adapter(tmp_path / "start", spec, start, str(base))
    (alone,) = train_alone(base, data, [tmp_path / "start"], torch.float64, tasks=tasks)
    errors = relative_errors(final_tensors(run, 0), alone["tensors"])
    assert max(errors.values()) < BAR, errors


def test_an_adapter_of_another_embedding_is_no_start(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base", num_hidden_layers=2)
    own = task("words", target_modules=("embed_tokens",))
    (start,) = make_starts(base, tmp_path / "starts", [own])
    spec, shape = adapter_spec(task_config(own)), read_shape(base)
    assert check_adapter(start, spec, shape) == []
    weights = start / "adapter_model.safetensors"
    named = load_file(weights)
    (table,) = (name for name in named if name.endswith("base_layer.weight"))
    named[table][3, 4] += 1e-3
    save_file(named, weights)
    (problem,) = check_adapter(start, spec, shape)
    assert f"{table} is not the model's own" in problem


@pytest.mark.parametrize(
    ("family", "fields", "problem"),
    [
        ("llama", dict(adapter="dora", target_modules=("embed_tokens",)), "dora is not supported"),
        ("qwen3", dict(adapter="pissa", target_modules=("lm_head",)), "lm_head and embed_tokens"),
        ("llama", dict(modules_to_save=("lm_head",)), "'lm_head' fits no norm of"),
        ("llama", dict(bias="all"), "bias: all, but base has no such biases"),
        ("qwen2", dict(bias="lora_only", target_modules=("o_proj",)), "has no such biases"),
    ],
)
def test_what_a_model_is_not_made_for_is_told(
    family: str, fields: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    shape = read_shape(save_family(family, tmp_path / "base", num_hidden_layers=2))
    own = task_config(task("x", **{"target_modules": ("q_proj",), **fields}))
    (found,) = adapter_problems(own, shape)
    assert problem in found
