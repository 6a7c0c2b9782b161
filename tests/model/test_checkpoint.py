"""What a model folder's weights must be before a rank reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import checkpoint_problems
from model.shapes import read_shape
from tests.model.support import save_llama


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


def test_half_precision_weights_are_read(tmp_path: Path) -> None:
    base = save_llama(tmp_path, num_hidden_layers=2)
    tensors = load_file(base / "model.safetensors")
    halves = {name: value.bfloat16() for name, value in tensors.items()}
    save_file(halves, base / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_problems(base, read_shape(base)) == []
