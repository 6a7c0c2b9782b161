"""What all sides train: a model of given sizes, the sequences of every step, fresh adapters.

The sequences of a step do not depend on the number of tasks: they are dealt out to more or fewer of
them. So numbers of tasks are compared at equal tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.sides.lengths import Lengths
from lobra.layout import sequences

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_SHARE = 1 / 3  # of a sequence, which is not learned
SPECIAL_TOKENS = 3  # the first ids, which no sequence has
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a Llama model with an untied head."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (inputs, outputs) of every linear of a layer."""
        head = self.hidden // self.heads
        keys = self.kv_heads * head
        return {
            "q_proj": (self.hidden, self.hidden),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (self.hidden, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }


@dataclass(frozen=True)
class Job:
    """A job's sizes.

    Attributes
    ----------
    model
        Of the base model.
    datasets
        Names of the data sets whose lengths the sequences have.
    num_sequences
        Of a step, an equal share from every data set.
    cap
        Tokens at which sequences are cut.
    max_tokens
        Most tokens of a micro-batch.
    learning_rate
        Of AdamW.
    """

    model: ModelSizes
    datasets: tuple[str, ...]
    num_sequences: int
    cap: int
    max_tokens: int
    learning_rate: float = 1e-4

    def step(self, lengths: Lengths, number: int, num_tasks: int) -> list[sequences.Sequence]:
        """Return the sequences of a step, ordered by task; the same tokens for any `num_tasks`."""
        generator = np.random.default_rng((0, number))
        share = self.num_sequences // len(self.datasets)
        drawn = [generator.choice(lengths.of[name], share) for name in self.datasets]
        found = []
        for index, length in enumerate(np.clip(np.concatenate(drawn), 2, self.cap).tolist()):
            tokens = generator.integers(SPECIAL_TOKENS, self.model.vocabulary, length)
            targets = np.arange(max(1, int(length * PROMPT_SHARE)), length)
            task = index * num_tasks // (share * len(self.datasets))
            found.append(
                sequences.Sequence(task, index, tokens.astype(np.int32), targets.astype(np.int32))
            )
        return found


_LLAMA_8B_LAYERS = ModelSizes(4096, 14336, 8, 32, 8, 32_000)
_FOUR = ("dolly_3k", "evol_instruct_code", "xsum", "us_bills_115_all")
_EIGHT = (*_FOUR, "cnn_dailymail", "pubmedqa", "math_cot_adapters", "metamath_backward")
JobName = Literal["cpu", "cuda", "tiny"]
JOBS: Mapping[str, Job] = {
    # The head is as small a part of the model as it is of an 8B one.
    "cpu": Job(ModelSizes(512, 1376, 8, 8, 8, 2048), _EIGHT, 64, 512, 4096),
    "cuda": Job(_LLAMA_8B_LAYERS, _FOUR, 128, 4096, 8192),
    # Seconds: for tests, which must see what an update does, and to try the command.
    "tiny": Job(ModelSizes(64, 96, 2, 4, 2, 256), _FOUR, 16, 48, 128, learning_rate=3e-3),
}


def save_model(sizes: ModelSizes, folder: Path, dtype: torch.dtype, device: str) -> None:
    """Write a model with random weights to a folder, as transformers does."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def task_name(task: int) -> str:
    """Return the name of a task, of which none is the beginning of another's."""
    return f"task{task:03d}"


def fresh_adapter(sizes: ModelSizes, task: int, rank: int) -> dict[str, torch.Tensor]:
    """Return A and B of a task on every linear, under PEFT's names: A uniform, B zero."""
    seed = int.from_bytes(hashlib.sha256(f"{task}/{rank}".encode()).digest()[:7], "little")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, inputs, outputs in _places(sizes):
        bound = 1 / math.sqrt(inputs)
        A = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = torch.zeros(outputs, rank)
    return tensors


def _places(sizes: ModelSizes) -> Iterator[tuple[str, int, int]]:
    for layer in range(sizes.layers):
        for module, (inputs, outputs) in sizes.linears().items():
            block = "mlp" if module in MODULES[4:] else "self_attn"
            yield f"base_model.model.model.layers.{layer}.{block}.{module}", inputs, outputs


def step_flops(sizes: ModelSizes, step: Sequence[sequences.Sequence]) -> float:
    """Return the floating-point operations of the frozen model in a step, forward and backward.

    A frozen weight takes part in two products, 4 operations a token and weight; the head's only for
    tokens that are learned. Causal attention multiplies queries, keys and values twice forward and
    four times backward, half of each square: 6 x hidden size x the squares of the lengths.
    """
    weights = sizes.layers * sum(i * o for i, o in sizes.linears().values())
    tokens = sum(len(sequence.tokens) for sequence in step)
    labels = sum(len(sequence.targets) for sequence in step)
    squares = sum(len(sequence.tokens) ** 2 for sequence in step)
    head = sizes.hidden * sizes.vocabulary
    return 4.0 * (weights * tokens + head * labels) + 6.0 * sizes.layers * sizes.hidden * squares
