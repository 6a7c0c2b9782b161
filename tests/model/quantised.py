"""Models whose linears have the values that bitsandbytes' own functions make of them.

In fp8, which it does not have, those that follow from what e4m3 is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def in_e4m3(rows: Tensor) -> Tensor:
    """Return rows, fp64, rounded to e4m3 times a power of two.

    By which their largest value is at least 128 and less than 256. Numbers from 2^-6 on have three
    binary digits behind the first, smaller ones are multiples of 2^-9 (arXiv 2209.05433, table 1).
    """
    power = torch.frexp(rows.abs().amax(1, keepdim=True)).exponent.double() - 8
    scaled = rows / 2.0**power
    last_digit = torch.frexp(scaled).exponent.double().clamp(min=-5) - 4
    return (scaled / 2.0**last_digit).round() * 2.0 ** (last_digit + power)


def as_the_library_makes_it(weight: Tensor, quantised: str) -> Tensor:
    """Return a whole weight, in fp32, quantised and made again."""
    if quantised == "fp8":
        return in_e4m3(weight.double()).float()
    if quantised == "int8":
        values, scales, _ = int8_vectorwise_quant(weight.float())
        made = values * (scales / 127)[:, None]
        torch.testing.assert_close(int8_vectorwise_dequant(values, scales), made, rtol=2e-7, atol=0)
        return made
    blocks = weight.float().view(-1, 64)  # rows that are no whole blocks it reads wrongly on a CPU
    packed, state = quantize_4bit(blocks, compress_statistics=True, quant_type="nf4")
    return dequantize_4bit(packed, state).view(weight.shape)


def save_dequantised(base: Path, folder: Path, quantised: str) -> Path:
    """Save a model, in fp32, whose layers' linears have the values of quantised ones."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = as_the_library_makes_it(module.weight.data, quantised)
    model.save_pretrained(folder)
    return folder


def save_quantised(base: Path, folder: Path, **settings: Any) -> Any:
    """Have transformers and bitsandbytes quantise a model and save it; return the model."""
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**settings),
        device_map="cpu",
    )
    model.save_pretrained(folder)
    return model
