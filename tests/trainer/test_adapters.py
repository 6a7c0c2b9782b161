"""Exported adapters are PEFT's: they load unchanged and give the logits our model gives."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lobra.layout.layout import Layout
from lobra.layout.shapes import ModelShape
from lobra.layout.world import one_replica
from lobra.model.flat_tensors import FlatTensors
from lobra.model.launch import run_ranks
from lobra.model.site import sites
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.adapters import adapter_spec, check_adapter, save_adapter
from lobra.trainer.exporter import AdapterExporter
from lobra.trainer.log_parts import METRICS_FILE
from lobra.trainer.metrics import read_metrics
from lobra.trainer.run import run_local
from tests.trainer.support import make_plan, make_run, random_dataset

SHAPE = ModelShape("base", 4, 64, 96, 4, 2, 16, 256)  # what save_llama saves
SHARED_FIELDS = dict(dataset_name="random", context_length=64, learning_rate=2e-2)
TASKS = (
    TaskConfig("wide", 8, 16.0, TARGET_MODULES, 4, **SHARED_FIELDS),
    TaskConfig("narrow", 2, 1.0, ("o_proj", "gate_proj"), 3, **SHARED_FIELDS),
)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of a two-step run on a heterogeneous plan."""
    data = [random_dataset(12, 8, 40, 256, seed) for seed in range(2)]
    plan = make_plan([(1, 1), (1, 2)], max_tokens=64)
    run = make_run(tmp_path_factory.mktemp("adapters") / "run", base, TASKS, data, plan, 2)
    run_local(run)
    return [run.adapter_folder(number) for number in range(2)]


@pytest.mark.parametrize("tp", [1, 2])
def test_logits_of_the_exported_adapter_in_peft(base: Path, trained: list[Path], tp: int) -> None:
    tokens = np.random.default_rng(0).integers(3, 256, (4, 30))
    row_tasks = (0, 0, 1, 1)
    slices = run_ranks(
        "tests.trainer.support:logits_on_rank",
        tp,
        dict(
            model_folder=base,
            world=one_replica(Layout(tp, 1)),
            tasks=TASKS,
            adapters=trained,
            tokens=tokens,
            row_tasks=row_tasks,
        ),
    )
    ours = np.concatenate(slices, axis=-1)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        unadapted = plain(torch.from_numpy(tokens)).logits.numpy()
    for number, folder in enumerate(trained):
        rows = [row for row, task in enumerate(row_tasks) if task == number]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens[rows])).logits.numpy()
        np.testing.assert_allclose(ours[rows], theirs, atol=1e-4, rtol=1e-4)
        assert np.abs(theirs - unadapted[rows]).max() > 1e-2, "the adapter does nothing"


#: What vLLM reads of adapter_config.json and its type (`PEFTHelper` of its `vllm.lora`), the first
#: three required; it refuses `modules_to_save` and DoRA, and knows tensors by the names below.
VLLM_FIELDS = {
    "r": int, "lora_alpha": int, "target_modules": list, "bias": str, "use_rslora": bool,
    "use_dora": bool,
}  # fmt: skip
VLLM_TENSOR = re.compile(r"base_model\.model\.(.+)\.(?:lora_[AB]\.weight|lora_embedding_[AB])")


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_vllm_can_read_what_is_written(kind: str, tmp_path: Path) -> None:
    spec = replace(adapter_spec(TASKS[0]), kind=kind, rank=4, alpha=6.0)
    tensors = {
        tensor.name: tensor.as_peft(tensor.start()).contiguous()
        for tensor in FlatTensors.whole(spec, SHAPE).tensors
    }
    save_adapter(tmp_path / "adapter", spec, tensors, "base")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for field, kind_of in VLLM_FIELDS.items():
        assert type(config[field]) is kind_of, field
    assert config["bias"] == "none" and not config["use_dora"] and not config["modules_to_save"]
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    assert {spec.scaling(site) for site in sites(SHAPE)} == {config["lora_alpha"] / divisor}
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = map(VLLM_TENSOR.fullmatch, weights)
    modules = {match[1].rpartition(".")[2] for match in found if match is not None}
    assert modules == set(config["target_modules"])


def test_an_adapter_that_does_not_fit_the_task_is_refused(trained: list[Path]) -> None:
    assert check_adapter(trained[0], adapter_spec(TASKS[0]), SHAPE) == []
    problems = "\n".join(check_adapter(trained[1], adapter_spec(TASKS[0]), SHAPE))
    for wrong in ("r is 2", "lora_alpha is 1,", "down_proj"):
        assert wrong in problems
    assert "not found" in check_adapter(trained[0] / "nowhere", adapter_spec(TASKS[0]), SHAPE)[0]
    wider = replace(SHAPE, hidden_size=128, head_dim=32)
    assert "(8, 64), the model and the task need (8, 128)" in "\n".join(
        check_adapter(trained[0], adapter_spec(TASKS[0]), wider)
    )
    shallow = "\n".join(
        check_adapter(trained[0], adapter_spec(TASKS[0]), replace(SHAPE, num_layers=3))
    )
    assert "layers.3" in shallow and "of no layer of the model" in shallow


def test_a_damaged_adapter_is_refused(trained: list[Path], tmp_path: Path) -> None:
    save_adapter(
        tmp_path / "copy",
        adapter_spec(TASKS[0]),
        load_file(trained[0] / "adapter_model.safetensors"),
        "base",
    )
    assert check_adapter(tmp_path / "copy", adapter_spec(TASKS[0]), SHAPE) == []
    weights = tmp_path / "copy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "not readable" in check_adapter(tmp_path / "copy", adapter_spec(TASKS[0]), SHAPE)[0]
    config = tmp_path / "copy" / "adapter_config.json"
    config.write_text("{")
    assert "not readable" in check_adapter(tmp_path / "copy", adapter_spec(TASKS[0]), SHAPE)[0]


def test_an_adapter_that_is_not_finite_is_no_start(trained: list[Path], tmp_path: Path) -> None:
    spec = adapter_spec(TASKS[1])
    tensors = load_file(trained[1] / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name][0, 1] = float("inf")
    save_adapter(tmp_path / "copy", spec, tensors, "base")
    (problem,) = check_adapter(tmp_path / "copy", spec, SHAPE)
    assert f"{name} holds values that are not finite" in problem


def test_an_exported_adapter_has_a_card_that_the_hub_reads(trained: list[Path]) -> None:
    for folder, task in zip(trained, TASKS, strict=True):
        steps = [line["tasks"][task.name] for line in read_metrics(folder.parents[1])]
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
        config = json.loads((folder / "adapter_config.json").read_text())
        assert card.data.base_model == config["base_model_name_or_path"]
        assert f"# {task.name}" in card.text and ", ".join(task.target_modules) in card.text
        assert (
            f"| {steps[0]['loss']:.4f} in step 1, {steps[1]['loss']:.4f} in step 2 |" in card.text
        )


def test_an_exported_adapter_that_is_not_finite_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    specs = [adapter_spec(task) for task in TASKS]
    exported = [{"x": torch.ones(2)}, {"x": torch.ones(2), "y": torch.tensor([1.0, math.nan])}]
    exporter = AdapterExporter.__new__(AdapterExporter)
    exporter.is_writer, exporter.control = True, None  # type: ignore[assignment]
    exporter.run = SimpleNamespace(
        base_model="base", precision="fp32", output_dir=tmp_path, tasks=TASKS,
        adapter_folder=lambda t: tmp_path / str(t),
    )  # fmt: skip
    (tmp_path / METRICS_FILE).touch()
    slots = {number: SimpleNamespace(spec=spec, number=number) for number, spec in enumerate(specs)}
    exporter.stage = SimpleNamespace(slots=slots)
    exporter._weights = lambda slot: exported[slot.number]  # type: ignore[method-assign, assignment]
    monkeypatch.setattr("lobra.trainer.exporter.dist.barrier", lambda group: None)
    exporter.export([0, 1], [])
    (record,) = caplog.records
    assert "adapter of task narrow" in record.getMessage()
    assert "(y and 0 more)" in record.getMessage()


def test_saving_replaces_an_older_adapter_whole(tmp_path: Path) -> None:
    spec = adapter_spec(TASKS[1])
    save_adapter(tmp_path / "a", spec, {"x": torch.zeros(2)}, "first")
    (tmp_path / "a" / "stale").write_text("old")
    save_adapter(tmp_path / "a", spec, {"x": torch.ones(2)}, "second")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_whoever_may_read_the_configuration_may_read_the_weights(tmp_path: Path) -> None:
    spec = adapter_spec(TASKS[1])
    save_adapter(tmp_path / "a", spec, {"x": torch.zeros(2)}, "base")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "a").iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]
