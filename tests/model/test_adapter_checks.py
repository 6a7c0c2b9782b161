"""What a model has of a task's adapter is known before anything is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lobra.layout.shapes import NAMED_SHAPES, read_shape
from lobra.model.adapter_checks import adapter_problems
from lobra.model.base_vectors import base_vectors
from lobra.tasks.config import TaskConfig
from tests.model.support import save_llama

TASK = TaskConfig(
    name="x", rank=64, lora_alpha=16.0, target_modules=("q_proj",), global_batch_size=1,
    dataset_name="x", context_length=64,
)  # fmt: skip


def test_the_vectors_of_a_model_known_by_name_are_those_transformers_builds(tmp_path: Path) -> None:
    shape = read_shape(save_llama(tmp_path / "base"))
    assert base_vectors(replace(shape, path=None)) == base_vectors(shape)


def test_a_model_known_by_name_needs_no_folder() -> None:
    fields = dict(bias="all", modules_to_save=("norm", "q_norm"), rank_pattern={"k_proj": 2})
    found = adapter_problems(replace(TASK, **fields), NAMED_SHAPES["7B"])
    assert [problem.partition(":")[0] for problem in found] == [
        "rank_pattern", "modules_to_save", "bias",
    ]  # fmt: skip
    assert not adapter_problems(replace(TASK, modules_to_save=("norm",)), NAMED_SHAPES["7B"])


def test_modules_that_are_wrong_hide_nothing_else() -> None:
    phi = replace(NAMED_SHAPES["7B"], fused=("qkv_proj",))
    found = adapter_problems(replace(TASK, bias="all"), phi)
    assert [problem.partition(":")[0] for problem in found] == ["target_modules", "bias"]
