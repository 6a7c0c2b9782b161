"""Small random models and rank functions for the multi-rank tests."""

from __future__ import annotations

import os
import signal
from collections import abc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from lobra.layout.layout import MEMORY_POLICIES
from lobra.layout.sequences import MicroBatch, Sequence
from lobra.layout.shapes import ModelShape
from lobra.layout.world import World, shard_range
from lobra.model import head
from lobra.model.adapter import AdapterSpec
from lobra.model.flat_tensors import FlatTensors
from lobra.model.groups import build_groups, new_group
from lobra.model.head import VocabParallelHead
from lobra.model.joint_stack import JointStack
from lobra.model.memory_policy import apply_policy
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors
from lobra.model.pipeline import run_replica
from lobra.model.segment_stack import SegmentStack
from lobra.model.stage import Stage, build_stage

SPECS = (
    AdapterSpec("first", 4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"), seed=1),
    AdapterSpec("second", 2, 2.0, ("gate_proj", "up_proj", "o_proj"), seed=2),
)


#: Half of a head is turned.
PARTIAL = {
    "rope_parameters": dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),  # biases on q, k and v
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),  # norms on q and k
    "mistral": (MistralConfig, {"sliding_window": None}),
    "gemma": (GemmaConfig, {"head_dim": 32, "tie_word_embeddings": True}),  # scaled embeddings
    "gemma2": (  # capped scores and logits, windows on every other layer, norms behind as well
        Gemma2Config,
        {
            **dict(head_dim=32, tie_word_embeddings=True, query_pre_attn_scalar=20),
            **dict(sliding_window=7, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        },
    ),
    "gemma3_text": (  # two kinds of rotary embedding, norms on q and k
        Gemma3TextConfig,
        {
            **dict(head_dim=32, tie_word_embeddings=True, query_pre_attn_scalar=20),
            **dict(sliding_window=7, sliding_window_pattern=3),
        },
    ),
    "granite": (  # multipliers
        GraniteConfig,
        {
            **dict(embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.2),
            **dict(logits_scaling=3.0, attention_bias=True, mlp_bias=True),
        },
    ),
    "phi3": (  # q, k, v one linear
        Phi3Config,
        {
            **dict(num_attention_heads=8, num_key_value_heads=4),
            **dict(pad_token_id=0, eos_token_id=2, sliding_window=50),
        },
    ),
    "glm": (GlmConfig, {"head_dim": 32, "attention_bias": True, **PARTIAL}),  # gate, up one linear
    "glm4": (Glm4Config, {"head_dim": 32, **PARTIAL}),  # and norms behind
    "olmo2": (Olmo2Config, {}),  # norms of all of q and k, and behind
}


def save_llama(folder: Path, **overrides: Any) -> Path:
    """Save a small random Llama (4 layers, grouped-query heads) and return its folder."""
    return save_family("llama", folder, **overrides)


def save_family(family: str, folder: Path, **overrides: Any) -> Path:
    """Save a small random model of a family; biases and norms are random too."""
    torch.manual_seed(0)
    config, own = FAMILIES[family]
    sizes: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    model = AutoModelForCausalLM.from_config(config(**{**sizes, **own, **overrides}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            around = float(
                "norm" in name and not family.startswith("gemma")
            )  # Gemma's norms scale by 1 + w
            torch.nn.init.normal_(parameter, mean=around, std=0.1)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def random_batches(num: int, vocab: int = 256) -> list[tuple[torch.Tensor, torch.Tensor, tuple]]:
    """Return micro-batches (tokens, labels, row tasks) of different shapes, some mixed."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for index in range(num):
        rows, length = (3, 20 - 3 * index) if index % 2 else (2, 24 - 3 * index)
        tokens = torch.randint(3, vocab, (rows, length), generator=generator)
        labels = tokens.clone()
        labels[:, : 3 + index] = -100
        labels[0, -2:] = -100
        row_tasks = ((0, 1), (0, 0, 1), (1, 1))[index % 3]
        row_tasks = (*row_tasks, *(1,) * (rows - len(row_tasks)))[:rows]
        batches.append((tokens, labels, tuple(row_tasks)))
    return batches


def micro_batch(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    row_tasks: tuple[int, ...],
    noise_seed: int = 0,
    packed: bool = False,
) -> MicroBatch:
    """Return a micro-batch that learns each token with a label that is not -100.

    Packed, the rows lie end to end, whole.
    """
    sequences = tuple(
        Sequence(
            task,
            row,
            tokens[row].numpy().astype(np.int32),
            1 + np.flatnonzero(labels[row, 1:].numpy() != -100).astype(np.int32),
            100 * noise_seed + row,
        )
        for row, task in enumerate(row_tasks)
    )
    return MicroBatch(sequences, None if packed else tokens.shape[1])


def tensors_of(
    stage: Stage, batches: abc.Sequence[MicroBatch], task_weights: abc.Sequence[float]
) -> list[MicroBatchTensors]:
    """Return micro-batches' tensors for a stage, its adapters' dropout included."""
    return micro_batch_tensors(
        batches, np.array(task_weights), stage.device, stage.dtype, stage.dropouts
    )


def random_adapter(
    shape: ModelShape, task: int, spec: AdapterSpec | None = None
) -> dict[str, torch.Tensor]:
    """Return random A and B of every layer under PEFT's names (a fresh B is zero: no gradient)."""
    generator = torch.Generator().manual_seed(task)
    tensors = FlatTensors.whole(spec or SPECS[task], shape).tensors
    return {t.name: torch.randn(t.shape, generator=generator) * 0.1 for t in tensors}


def gradients_on_rank(
    folder: Path, world: World, num: int, dropout: float = 0.0, packed: bool = False
) -> dict[str, Any]:
    """Run one replica's forward and backward; return gradients, losses and what was loaded."""
    groups = build_groups(world)
    specs = {task: replace(spec, dropout=dropout) for task, spec in enumerate(SPECS)}
    stage = build_stage(folder, groups, specs)
    for task in specs:
        stage.load(task, random_adapter(stage.shape, task))
    batches = [
        micro_batch(tokens, labels, rows, seed, packed)
        for seed, (tokens, labels, rows) in enumerate(random_batches(num))
    ]
    losses = run_replica(stage, tensors_of(stage, batches, [0.5, 0.25]), len(SPECS))
    gradients = {
        f"{task}.{name}": gradient.numpy()
        for task, slot in stage.slots.items()
        for name, gradient in slot.layout.named(slot.gradient).items()
    }
    elements = sum(p.numel() for p in stage.decoder.parameters())
    elements += sum(p.numel() for p in stage.head.parameters()) if stage.head else 0
    return {
        "gradients": gradients,
        "losses": losses.numpy(),
        "loaded_bytes": stage.loaded_bytes,
        "held_bytes": 4 * elements,
        "place": groups.place,
    }


def unlike_plain_autograd(folder: Path, world: World, kinds: tuple[str, str]) -> list[str]:
    """Return what a memory policy makes differ in a replica's losses and gradients, in fp64."""
    groups = build_groups(world)
    specs = {0: replace(SPECS[0], dropout=0.3, kind=kinds[0]), 1: replace(SPECS[1], kind=kinds[1])}
    different = []
    for stack_type, apart in ((SegmentStack, False), (JointStack, False), (JointStack, True)):
        expected: dict[str, torch.Tensor] = {}
        for policy in (None, *MEMORY_POLICIES):
            stage = build_stage(folder, groups, specs, dtype=torch.float64, stack_type=stack_type)
            stage.apart = apart
            if policy is not None:
                apply_policy(stage.decoder.layers, policy)
            for task, spec in specs.items():
                stage.load(task, random_adapter(stage.shape, task, spec))
            batches = [
                micro_batch(tokens, labels, rows, seed, packed=seed % 2 == 1)
                for seed, (tokens, labels, rows) in enumerate(random_batches(3))
            ]
            losses = run_replica(stage, tensors_of(stage, batches, [0.5, 0.25]), len(specs))
            found = {"losses": losses}
            found |= {f"gradient of task {n}": slot.gradient for n, slot in stage.slots.items()}
            expected = expected or found
            different += [
                f"{stack_type.__name__}, apart {apart}, {policy}: {name}"
                for name, value in found.items()
                if not torch.equal(value, expected[name])
            ]
            assert all(value.any() for name, value in found.items() if name != "losses")
    return different


def gradients_few_logits_at_once(
    folder: Path, world: World, num: int, logits: int
) -> dict[str, Any]:
    """Do `gradients_on_rank` with at most `logits` logits at once; add the head's chunk."""
    head.LOGITS_AT_ONCE = logits  # before the head is made; for this process alone
    chunks = []
    losses = VocabParallelHead.losses

    def noted(head: VocabParallelHead, *args: Any) -> torch.Tensor:
        chunks.append(head.chunk)
        return losses(head, *args)

    VocabParallelHead.losses = noted  # type: ignore[method-assign, assignment]
    return {**gradients_on_rank(folder, world, num), "chunks": chunks}


def sums_over_groups(world: World, num_layers: int) -> list[int]:
    """Return the sum of the ranks of this one's tp group, and of each block's that it holds, twice.

    Twice: two groups may have the same ranks.
    """
    own = torch.tensor([dist.get_rank()])

    def total(group: dist.ProcessGroup) -> int:
        value = own.clone()
        dist.all_reduce(value, group=group)
        return int(value)

    tp_group = build_groups(world).tp_group
    groups = [new_group(block.holders) for block in world.blocks(num_layers) for _ in range(2)]
    sums = [int(own) if tp_group is None else total(tp_group)]
    return sums + [total(group) for group in groups if group is not None]


def die_on_rank_one() -> None:
    """Have rank 1 killed, as for want of memory, while the others wait for it."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def fail_on_rank_one() -> None:
    """Fail on rank 1 while rank 0 waits for it in a collective."""
    if dist.get_rank() == 1:
        torch.empty(-1)
    dist.all_reduce(torch.zeros(1))


def loading_peak_bytes(folder: Path, world: World) -> tuple[int, int]:
    """Return (bytes of this rank's weights, how much the peak of resident memory rose)."""
    groups = build_groups(world)
    build_stage(folder.parent / "small", groups, {})  # everything lazy is imported and allocated
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident_bytes()
    stage = build_stage(folder, groups, {})
    return stage.loaded_bytes, peak_resident_bytes() - before


def peak_resident_bytes() -> int:
    """Return the kernel's high-water mark of this process's resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def loss_inputs(vocab: int, hidden: int, tokens: int, dtype: torch.dtype) -> tuple:
    """Return hidden states, the whole head, targets, and what each loss is multiplied by."""
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(tokens, hidden, generator=generator).to(dtype),
        torch.randn(vocab, hidden, generator=generator).to(dtype),
        torch.randint(0, vocab, (tokens,), generator=generator),
        torch.rand(tokens, generator=generator),
    )


def loss_and_gradient(
    vocab: int, hidden: int, tokens: int, dtype: torch.dtype, chunk: int,
    rows: range | None = None, group: dist.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the losses of random hidden states by our head and the states' gradient."""
    states, weight, targets, factors = loss_inputs(vocab, hidden, tokens, dtype)
    rows = rows or range(vocab)
    head = VocabParallelHead(weight[rows.start : rows.stop], rows, group, len(rows))
    head.chunk = chunk
    states.requires_grad_(True)
    losses = head.losses(states, targets)
    (losses * factors).sum().backward()
    assert states.grad is not None
    return losses.detach(), states.grad.float()


def vocab_parallel_loss(vocab: int, hidden: int, tokens: int, chunk: int) -> tuple:
    """Return losses and gradient with the vocabulary split over all ranks."""
    rows = shard_range(vocab, dist.get_world_size(), dist.get_rank())
    losses, gradient = loss_and_gradient(
        vocab, hidden, tokens, torch.float32, chunk, rows, dist.group.WORLD
    )
    return losses.numpy(), gradient.numpy()


def is_alive(pid: int) -> bool:
    """Return whether a process is there; of a group, given as -pid, whether any of it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
