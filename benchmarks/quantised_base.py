"""A base in eight and in four bits beside one that is not quantised: bytes, errors and time.

Of a random Llama. Bytes are those of the tensors that the rank of a layout holds which holds most
of the base, counted, beside what the estimator says. An error is how far the products of random
inputs are from those with the model's own weights in fp32, relative (Frobenius). Time, on a CPU the
processor's, is of one micro-batch's forward and backward pass through the layers of a replica
<1,1>, without adapters: the least of several, taken in turns with those of the others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from lobra.common.options import Device
from lobra.layout.base_precision import QUANTISED
from lobra.layout.layout import Layout
from lobra.layout.shapes import read_shape
from lobra.layout.world import one_replica
from lobra.model.groups import ReplicaGroups
from lobra.model.precision import DTYPES
from lobra.model.stage import Stage, build_stage
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_memory import Adapters, dequantised_bytes, estimate_memory
from lobra.profiler.hardware import resolve_device
from lobra.profiler.memory_rank import synthetic_batch

MIB = 1 << 20
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2))
BASES = (None, *QUANTISED)
INPUTS = 256  # of each linear, for its error


def quantised_base(
    *,
    hidden: int = 1024,
    ffn: int = 3072,
    layers: int = 4,
    tokens: tuple[int, ...] = (64, 512),
    repeats: int = 5,
    precision: Literal["fp32", "bf16"] = "bf16",
    device: Device = "auto",
) -> Iterator[dict[str, Any]]:
    """Count what ranks hold of a base, compare its products, and time its layers.

    Parameters
    ----------
    hidden, ffn, layers
        Sizes of the model.
    tokens
        Of the micro-batches that are timed.
    repeats
        How often each is.
    """
    where = torch.device(resolve_device(device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_model(folder, hidden, ffn, layers)
        for kept in BASES:
            for tp, pp in LAYOUTS:
                yield _bytes_of(folder, Layout(tp, pp), kept, precision, where)
        stages = {kept: _stage(folder, Layout(1, 1), 0, kept, precision, where) for kept in BASES}
        for kept, stage in stages.items():
            yield {"base": _name(kept), "error %": 100 * _error(stage, stages[None])}
        for count in tokens:
            taken_ms: dict[str | None, list[float]] = {kept: [] for kept in BASES}
            for _ in range(repeats):
                for kept, stage in stages.items():
                    taken_ms[kept].append(_time_ms(stage, count))
            least = {kept: min(times) for kept, times in taken_ms.items()}
            for kept in BASES:
                ratio = least[kept] / least[None]
                yield {"base": _name(kept), "tokens": count, "ms": least[kept], "times": ratio}


def _bytes_of(
    folder: Path, layout: Layout, kept: str | None, precision: str, device: torch.device
) -> dict[str, Any]:
    shape, runtime = read_shape(folder).kept_in(kept), load_tables().runtime(None)
    held = max(
        _stage(folder, layout, rank, kept, precision, device).base_bytes
        for rank in range(layout.num_gpus)
    )
    found = estimate_memory(shape, layout.tp, layout.pp, Adapters(()), precision, runtime)
    expected = found.fixed_bytes - dequantised_bytes(shape, layout.tp, precision)
    return {
        "base": _name(kept),
        "layout": str(layout),
        "held MiB": held / MIB,
        "estimated MiB": expected / MIB,
        "error %": 100 * (expected / held - 1),
    }


@torch.no_grad()
def _error(stage: Stage, plain: Stage) -> float:
    """Return how far the products of a stage's linears are from another's in fp32: their mean."""
    generator, errors = torch.Generator().manual_seed(1), []
    for own, exact in zip(stage.stacks, plain.stacks, strict=True):
        for base, other in zip(own.bases, exact.bases, strict=True):
            weight = other.weight_oi().float()
            x = torch.randn(INPUTS, weight.shape[1], generator=generator).to(stage.dtype)
            x = x.to(stage.device)
            expected = x.float() @ weight.t()
            errors.append(float((base.product(x).float() - expected).norm() / expected.norm()))
    return sum(errors[:-1]) / len(errors[:-1])  # but the head's, which is never quantised


def _stage(
    folder: Path, layout: Layout, rank: int, kept: str | None, precision: str, device: torch.device
) -> Stage:
    """Return the stage of one rank of a replica, alone."""
    groups = ReplicaGroups(one_replica(layout).place(rank), None, (rank,), None, (0, 1))
    dtype = DTYPES[precision]
    return build_stage(folder, groups, {}, dtype=dtype, device=device, base_precision=kept)


def _time_ms(stage: Stage, tokens: int) -> float:
    batch = synthetic_batch((1, tokens), stage)
    states_BSD = torch.randn(1, tokens, stage.shape.hidden_size, device=stage.device)
    states_BSD = states_BSD.to(stage.dtype).requires_grad_()
    on_gpu = stage.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    begin = clock()
    stage.hidden(batch, states_BSD).sum().backward()
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (clock() - begin)


def _save_model(folder: Path, hidden: int, ffn: int, layers: int) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, vocab_size=4096,
        num_attention_heads=heads, num_key_value_heads=max(4, heads // 4),
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _name(kept: str | None) -> str:
    return kept or "not quantised"
