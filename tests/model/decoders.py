"""Small random decoders of transformers' own, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel

from lobra.model.precision import NothingBelowDouble, in_double
from tests.model.support import FAMILIES

HIDDEN_SIZE = 32


def small_decoder(family: str, attention: str, **overrides: Any) -> Any:
    """Return a random frozen decoder of two layers; of a family always the same weights."""
    torch.manual_seed(0)
    config, own = FAMILIES[family]
    sizes = dict(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.2,
    )
    with NothingBelowDouble():
        model = AutoModel.from_config(
            config(**{**sizes, **own, **overrides}), attn_implementation=attention
        )
    model = model.double().requires_grad_(False)
    for module in (*model.layers, model.norm, model.rotary_emb):
        in_double(module)
    return model
