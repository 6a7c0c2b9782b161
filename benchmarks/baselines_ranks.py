"""What a rank of a baseline runs: LoRA training by tensor parallel, FSDP2 or a GPipe-like pipeline.

PEFT adapters on transformers' own model, PyTorch's own parallelism; of `trainer` only the reading
of memory, so that all methods' is read alike. Every method starts from the same adapter, trains on
all sequences of a step and takes the loss as the mean over the step's target tokens, so their
losses agree up to rounding.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import sample_indices
from lobra.trainer.step_report import step_memory_bytes

IGNORED = -100
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Work:
    """What is trained and how often.

    ``max_tokens``: padded tokens of a micro-batch; ``seed``: of the order of the sequences;
    ``adapter_folder``: where the adapter all methods start from is written, in PEFT's format.
    """

    model_folder: Path
    data_folder: Path
    adapter_folder: Path
    targets: tuple[str, ...]
    rank: int
    alpha: int
    batch_size: int
    steps: int
    max_tokens: int
    learning_rate: float
    precision: str
    device: str
    seed: int


@dataclass(frozen=True)
class Measured:
    """What was measured on a rank, step by step: seconds, mean loss, tokens, memory in bytes.

    Memory is the peak within the step on a GPU, what is resident after the backward pass on a CPU.
    """

    step_time_s: tuple[float, ...]
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    memory_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """A micro-batch: ids and labels, int64 [b, s], padded on the right."""

    ids: Tensor
    labels: Tensor


def train(method: str, work: Work) -> Measured:
    """Train with one of ``METHODS`` on this rank of the world; return what was measured."""
    device = torch.device(work.device, dist.get_rank() if work.device == "cuda" else 0)
    data = TokenizedDataset.load(work.data_folder)
    model = _model(work)
    if dist.get_rank() == 0:
        model.save_pretrained(work.adapter_folder)  # type: ignore[operator]
    step_of, parameters = METHODS[method](model, device)
    optimizer = torch.optim.AdamW(parameters, lr=work.learning_rate, foreach=False, weight_decay=0)
    times, losses, tokens, memory = [], [], [], []
    step_memory_bytes()  # the first step's peak starts after the set-up's
    for step in range(work.steps):
        chosen = sample_indices(len(data), work.batch_size, work.seed, step)
        dist.barrier()
        start = time.perf_counter()
        batches = micro_batches(data, chosen, work.max_tokens, device)
        targets = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
        losses.append(step_of(batches, targets))
        memory.append(step_memory_bytes())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if work.device == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        times.append(time.perf_counter() - start)
        tokens.append(int(data.lengths[chosen].sum()))
    return Measured(tuple(times), tuple(losses), tuple(tokens), tuple(memory))


def micro_batches(
    data: TokenizedDataset, chosen: np.ndarray, max_tokens: int, device: torch.device
) -> list[Batch]:
    """Return the step's micro-batches: sequences by length, packed up to ``max_tokens``."""
    order = chosen[np.argsort(-data.lengths[chosen], kind="stable")]
    groups: list[list[int]] = []
    for index in order.tolist():
        longest = int(data.lengths[groups[-1][0]]) if groups else 0
        if not groups or longest * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(index)
    return [_padded(data, group, device) for group in groups]


def _padded(data: TokenizedDataset, group: Sequence[int], device: torch.device) -> Batch:
    length = int(max(data.lengths[index] for index in group))
    ids = np.zeros((len(group), length), dtype=np.int64)
    labels = np.full((len(group), length), IGNORED, dtype=np.int64)
    for row, index in enumerate(group):
        tokens, targets = data.sequence(index)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = targets
    return Batch(torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device))


def _model(work: Work) -> nn.Module:
    """Return the model with its adapter, in host memory: each method moves only its share."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    dtype = torch.bfloat16 if work.precision == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(work.model_folder, dtype=dtype)
    torch.manual_seed(0)  # the adapters' A, the same on every rank and in every method
    config = LoraConfig(
        r=work.rank, lora_alpha=work.alpha, target_modules=list(work.targets), task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def _loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss of next-token prediction (logits [b, s, vocabulary])."""
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


StepOf = Callable[[Sequence[Batch], int], float]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tensor_parallel(model: nn.Module, device: torch.device) -> tuple[StepOf, list[nn.Parameter]]:
    """Split every linear and its adapter over ranks (PyTorch's DTensor), data parallel beyond that.

    As many ranks form a tensor-parallel group as the model has key/value heads, at most.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    world = dist.get_world_size()
    heads = model.get_base_model().config.num_key_value_heads  # type: ignore[operator, union-attr]
    tp = math.gcd(world, heads)
    mesh = init_device_mesh(device.type, (world // tp, tp), mesh_dim_names=("dp", "tp"))
    replica, replicas = mesh["dp"].get_local_rank(), mesh["dp"].get_group()
    plan: dict[str, Any] = {}
    for name, _ in model.named_modules():
        short = name.rsplit(".", 1)[-1]
        if short in COLUMN:
            plan[f"{name}.base_layer"] = ColwiseParallel()
            plan[f"{name}.lora_B.default"] = ColwiseParallel()
        elif short in ROW:
            plan[f"{name}.base_layer"] = RowwiseParallel()
            plan[f"{name}.lora_A.default"] = RowwiseParallel()
    parallelize_module(model, mesh["tp"], plan)
    model.to(device)
    parameters = _trained(model)

    def step(batches: Sequence[Batch], targets: int) -> float:
        total = torch.zeros((), device=device)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for batch in batches[replica :: world // tp]:
            loss = _loss_sum(model(input_ids=batch.ids, use_cache=False).logits, batch.labels)
            (loss / targets).backward()
            total += loss.detach()
        for parameter in parameters:
            grad = parameter.grad
            assert grad is not None
            dist.all_reduce(grad.to_local() if isinstance(grad, DTensor) else grad, group=replicas)
        dist.all_reduce(total, group=replicas)
        return float(total) / targets

    return step, parameters


def fully_sharded(model: nn.Module, device: torch.device) -> tuple[StepOf, list[nn.Parameter]]:
    """Shard every layer's weights over the world, data parallel (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.get_base_model().model.layers:  # type: ignore[operator, union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to(device)

    def step(batches: Sequence[Batch], targets: int) -> float:
        total = torch.zeros((), device=device)
        rounds = -(-len(batches) // world)  # every rank takes part in every gathering of weights
        for number in range(rounds):
            at = number * world + rank
            batch = batches[min(at, len(batches) - 1)]
            if at >= len(batches):  # nothing left for this rank: one token without a loss
                batch = Batch(batch.ids[:1, :2], torch.full_like(batch.labels[:1, :2], IGNORED))
            loss = _loss_sum(model(input_ids=batch.ids, use_cache=False).logits, batch.labels)
            (loss * world / targets).backward()  # FSDP averages gradients over the ranks
            total += loss.detach()
        dist.all_reduce(total)
        return float(total) / targets

    return step, _trained(model)


def pipeline(model: nn.Module, device: torch.device) -> tuple[StepOf, list[nn.Parameter]]:
    """Give every rank a run of layers; all forward passes, then all backward passes (GPipe)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    base = model.get_base_model().model  # type: ignore[operator, union-attr]
    head = model.get_base_model().lm_head  # type: ignore[operator, union-attr]
    bounds = np.linspace(0, len(base.layers), world + 1).round().astype(int)
    layers = list(base.layers)[bounds[rank] : bounds[rank + 1]]
    width, dtype = base.config.hidden_size, next(base.parameters()).dtype
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    for index, layer in enumerate(base.layers):
        if not bounds[rank] <= index < bounds[rank + 1]:
            layer.to("meta")  # the weights of other stages are not kept
    if rank > 0:
        base.embed_tokens.to("meta")
    if rank < world - 1:
        head.to("meta")
    for part in (*layers, base.rotary_emb, *([base.embed_tokens] if rank == 0 else ())):
        part.to(device)
    if rank == world - 1:
        base.norm.to(device)
        head.to(device)

    def run(hidden: Tensor) -> Tensor:
        places = torch.arange(hidden.shape[1], device=device)[None]
        rotary = base.rotary_emb(hidden, places)
        for layer in layers:
            out = layer(hidden, position_embeddings=rotary, position_ids=places)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def step(batches: Sequence[Batch], targets: int) -> float:
        total = torch.zeros((), device=device)
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        for batch in batches:
            shape = (*batch.ids.shape, width)
            if rank == 0:
                hidden = base.embed_tokens(batch.ids).detach()
            else:
                hidden = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(hidden, rank - 1)
            hidden.requires_grad_()
            out = run(hidden)
            inputs.append(hidden)
            if rank == world - 1:
                loss = _loss_sum(head(base.norm(out)), batch.labels)
                total += loss.detach()
                outputs.append(loss / targets)
            else:
                dist.send(out.detach().contiguous(), rank + 1)
                outputs.append(out)
        for hidden, out in zip(inputs, outputs, strict=True):
            if rank == world - 1:
                out.backward()
            else:
                grad = torch.empty_like(out)
                dist.recv(grad, rank + 1)
                out.backward(grad)
            if rank > 0:
                assert hidden.grad is not None
                dist.send(hidden.grad.contiguous(), rank - 1)
        dist.broadcast(total, world - 1)
        return float(total) / targets

    return step, parameters


METHODS: dict[str, Callable[[nn.Module, torch.device], tuple[StepOf, list[nn.Parameter]]]] = {
    "tensor parallel": tensor_parallel,
    "FSDP2 + PEFT": fully_sharded,
    "pipeline (GPipe)": pipeline,
}
