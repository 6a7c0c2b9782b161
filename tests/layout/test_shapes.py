"""A model's shape as read from its config.json, against transformers' reading of the same file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lobra.common.errors import ConfigError
from lobra.layout.shapes import (
    SUPPORTED_MODEL_TYPES,
    ModelShape,
    layout_problem,
    read_shape,
)
from lobra.tasks.target_modules import TARGET_MODULES
from tests.model.support import FAMILIES

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "vocab_size": 100,
}
GIVEN = [{}, {"head_dim": 48}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}]


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_what_a_config_leaves_out_is_what_transformers_assumes(
    model_type: str, given: dict, tmp_path: Path
) -> None:
    config = {"model_type": model_type, "num_key_value_heads": 6, **SIZES, **given}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, theirs = read_shape(tmp_path), AutoConfig.from_pretrained(tmp_path)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert shape.head_dim == head_dim
    assert shape.tied_embeddings == theirs.tie_word_embeddings
    assert shape.num_kv_heads == theirs.num_key_value_heads
    assert (shape.num_layers, shape.vocab_size) == (theirs.num_hidden_layers, theirs.vocab_size)


def test_parts_of_a_fused_linear_are_targets_together() -> None:
    plain = ModelShape("plain", 2, 64, 96, 4, 2, 16, 256)
    phi = replace(plain, name="phi", fused=("qkv_proj", "gate_up_proj"))
    assert phi.own_modules(TARGET_MODULES) == ("o_proj", "down_proj", "qkv_proj", "gate_up_proj")
    assert set(plain.own_modules(TARGET_MODULES)) == set(TARGET_MODULES)
    assert phi.own_modules(phi.own_modules(TARGET_MODULES)) == phi.own_modules(TARGET_MODULES)
    of_parts = plain.adapter_elements(3, TARGET_MODULES)
    # One A in place of three, and one in place of two.
    assert phi.adapter_elements(3, TARGET_MODULES) == of_parts - 2 * 3 * (2 + 1) * 64
    with pytest.raises(ConfigError) as caught:
        phi.own_modules(["q_proj", "v_proj", "up_proj", "wrong"])
    said = str(caught.value)
    assert "q_proj and v_proj alone" in said and "up_proj alone" in said and "'wrong'" in said


def test_a_fused_linear_is_split_between_groups_of_heads() -> None:
    shape = ModelShape("phi", 2, 64, 96, 4, 2, 16, 256, fused=("qkv_proj",))
    assert layout_problem(shape, 2, 1) is None
    assert "one with the queries'" in (layout_problem(shape, 4, 1) or "")
    fused = shape.fused_linears()["qkv_proj"]
    assert fused.part_rows(range(64, 128)) == [range(32, 64), range(80, 96), range(112, 128)]


def test_all_problems_of_a_config_at_once(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", **SIZES, "hidden_size": 0, "vocab_size": "many"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_shape(tmp_path)
    for part in ('model_type = "gpt2"', "hidden_size = 0", 'vocab_size = "many"', "gemma"):
        assert part in str(caught.value)


def problems_of(folder: Path, **given: object) -> str:
    config = {"model_type": "llama", **SIZES, **given}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        read_shape(folder)
    return str(caught.value)


def test_a_quantised_model_is_refused_with_all_else(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, hidden_size=0, quantization_config={"quant_method": "fp8"})
    assert "hidden_size = 0" in problems
    assert "quantization_config: quantised weights are not read" in problems


@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_embeddings_that_depend_on_the_batch_are_refused(
    field: str, name: str, tmp_path: Path
) -> None:
    for kind in ("dynamic", "longrope"):
        given = {name: kind, "factor": 2.0}
        for value in (given, {"full_attention": given}):
            if kind == "dynamic" or value is not given:
                found = problems_of(tmp_path, **{field: value})
                assert f"{field}: the rope type {kind!r}" in found


def test_embeddings_that_are_fixed_are_read(tmp_path: Path) -> None:
    for kind in ("llama3", "yarn", "longrope"):
        rope = {"rope_type": kind, "factor": 8.0}
        config = {"model_type": "llama", **SIZES, "rope_scaling": rope, "rope_parameters": None}
        config["max_position_embeddings"] = 77
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_shape(tmp_path).max_positions == 77


def rotary(rope: dict[str, object], length: int) -> torch.Tensor:
    """Return what transformers multiplies queries and keys with."""
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope
    )
    positions = torch.arange(length)[None]
    return torch.stack(LlamaRotaryEmbedding(config)(torch.ones(1, length, 64), positions))


def test_the_remedy_for_a_rope_type_is_right(tmp_path: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    dynamic = plain | {"rope_type": "dynamic", "factor": 4.0}
    assert torch.equal(rotary(dynamic, 64), rotary(plain, 64))
    assert not torch.equal(rotary(dynamic, 100)[:, :, :64], rotary(plain, 64))
    problems = problems_of(tmp_path, rope_parameters=dynamic, max_position_embeddings=64)
    assert "up to 64 tokens it does nothing" in problems


def test_every_supported_family_is_tested_and_on_the_page_of_models(project_root: Path) -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", (project_root / "docs" / "models.md").read_text(), re.M)
    described = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    described.remove("model_type")
    assert sorted(described) == sorted(SUPPORTED_MODEL_TYPES) == sorted(FAMILIES)
