"""A step's operations are those that torch counts while transformers and PEFT train it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lobra.layout.sequences import Work
from lobra.layout.shapes import ModelShape
from lobra.profiler.accelerators import load_tables
from lobra.profiler.flops import training_flops

RANK, MODULES = 3, ("q_proj", "o_proj", "up_proj")
SHAPE = ModelShape("small", 3, 32, 48, 4, 2, 8, 100)


@pytest.mark.parametrize("modules", [MODULES, (*MODULES, "lm_head")])
@pytest.mark.parametrize("lengths", [(7,), (5, 5, 5)])
def test_operations_are_those_that_torch_counts(
    lengths: tuple[int, ...], modules: tuple[str, ...]
) -> None:
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, attn_implementation="eager",
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=RANK, target_modules=list(modules))
    )
    model.enable_input_require_grads()  # else the first layer's inputs have no gradient
    tokens = torch.arange(sum(lengths)).reshape(len(lengths), -1)
    counter = FlopCounterMode(display=False)
    with counter:
        # The loss alone predicts one token less: all positions have their logits.
        model(tokens).logits.sum().backward()
    squares = sum(length**2 for length in lengths)
    # Without flash attention, positions that are not looked at are computed too, and masked.
    work = Work(sum(lengths), 2 * squares, sum(lengths))
    assert training_flops(SHAPE, work, RANK, modules) == counter.get_total_flops()


def test_the_peak_of_a_gpu_is_known_by_its_name() -> None:
    tables = load_tables()
    assert tables.peak_flops_per_s("NVIDIA H200", "bf16") == 989e12
    assert tables.peak_flops_per_s("NVIDIA A100-PCIE-40GB", "fp32") == 19.5e12
    assert tables.peak_flops_per_s("NVIDIA H100 PCIe", "bf16") is None, "another peak"
    assert tables.peak_flops_per_s("NVIDIA H200", "fp64") is None
