"""What a model folder's weights must be before a rank reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobra.layout.shapes import read_shape
from lobra.model.checkpoint import checkpoint_problems, needed_tensors
from tests.model.support import FAMILIES, save_family, save_llama


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "input_layernorm"])
def test_quantised_weights_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2)
    assert checkpoint_problems(base, read_shape(base)) == []
    tensors = load_file(base / "model.safetensors")
    name = f"model.layers.1.{name}.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (problem,) = checkpoint_problems(base, read_shape(base))
    assert name in problem
    assert "use the unquantised model" in problem


def change(base: Path, **changes: torch.Tensor | None) -> None:
    """Add tensors to a checkpoint, or take them out (None)."""
    tensors = load_file(base / "model.safetensors") | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_complete_as_saved(family: str, tmp_path: Path) -> None:
    base = save_family(family, tmp_path, num_hidden_layers=2)
    shape = read_shape(base)
    assert checkpoint_problems(base, shape) == []
    saved = {name: tuple(t.shape) for name, t in load_file(base / "model.safetensors").items()}
    assert needed_tensors(base, shape) == saved
    for name in saved:  # norms and biases too
        change(base, **{name: None})
        (problem,) = checkpoint_problems(base, shape)
        assert f"has no tensor {name!r}" in problem
        save_family(family, tmp_path, num_hidden_layers=2)


def test_biases_that_the_configuration_asks_for_must_be_there(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    problems = checkpoint_problems(base, read_shape(base))
    assert len(problems) == 8 and "'model.layers.0.self_attn.q_proj.bias'" in problems[0]


def test_biases_that_would_not_be_used_are_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2, attention_bias=True, mlp_bias=True)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"attention_bias": False, "mlp_bias": False})
    )
    change(base, **{"lm_head.bias": torch.zeros(256)})
    problems = checkpoint_problems(base, read_shape(base))
    assert len(problems) == 7 + 1  # a line for each kind, not for each layer
    (query,) = [problem for problem in problems if "q_proj.bias" in problem]
    assert "'model.layers.0.self_attn.q_proj.bias' (and 1 more like it)" in query
    assert "set attention_bias in config.json" in query
    assert sum("mlp_bias" in problem for problem in problems) == 3
    assert any("'lm_head.bias'" in problem for problem in problems)


def test_layers_beyond_the_last_are_refused(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=3)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    (problem,) = checkpoint_problems(base, read_shape(base))
    assert "layers up to 'model.layers.2'" in problem and "num_hidden_layers 2" in problem


def test_what_is_no_part_of_the_model_is_no_matter(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2)
    change(
        base,
        **{
            "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            "model.rotary_emb.inv_freq": torch.zeros(8),
            "value_head.weight": torch.zeros(1, 64),
        },
    )
    assert checkpoint_problems(base, read_shape(base)) == []


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    base = save_family("gemma", tmp_path, num_hidden_layers=2)
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    change(base, **{"lm_head.weight": table.clone()})
    assert checkpoint_problems(base, read_shape(base)) == []
    table[-1, -1] += 1
    change(base, **{"lm_head.weight": table})
    (problem,) = checkpoint_problems(base, read_shape(base))
    assert "'lm_head.weight' differs" in problem and "tie_word_embeddings" in problem


def test_a_configuration_that_transformers_refuses_is_named(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_act": "no such function"}))
    (problem,) = checkpoint_problems(base, read_shape(base))
    assert "config.json: transformers builds no model from it" in problem


def test_half_precision_weights_are_read(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2)
    tensors = load_file(base / "model.safetensors")
    halves = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_problems(base, read_shape(base)) == []
