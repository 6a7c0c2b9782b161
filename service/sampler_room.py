"""Where the sampler runs and what its memory holds: ranks are to keep what is theirs."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lobra.layout.shapes import ModelShape
from lobra.profiler.estimate_memory import layer_weights
from lobra.profiler.hardware import available_memory_bytes, describe_device
from lobra.profiler.layer_memory import FLOAT_BYTES, element_bytes
from lobra.service.deployment import CUDA_MEMORY_SHARE, Deployment

log = logging.getLogger(__name__)

LEAST_ROOM = 1 << 30  # beside the model; a GPU that has less is left to the ranks


@dataclass(frozen=True)
class SamplerRoom:
    """A device, and the bytes that samples may take there beside the model's copy."""

    device: str
    free_bytes: int


def sampler_room(deployment: Deployment) -> SamplerRoom:
    """Return where samples are drawn: a GPU without ranks, what they leave of one, or a CPU."""
    run, model_bytes = deployment.run, model_copy_bytes(deployment.shape, deployment.run.precision)
    if run.device == "cuda":
        described = describe_device("cuda")
        total_bytes = described["memory_bytes"]
        if described["num_devices"] > run.world_size:
            own_bytes = int(CUDA_MEMORY_SHARE * total_bytes)
            return SamplerRoom(f"cuda:{run.world_size}", own_bytes - model_bytes)
        left_bytes = total_bytes - deployment.admission.budget_bytes - model_bytes
        if left_bytes >= LEAST_ROOM:
            return SamplerRoom("cuda:0", left_bytes)
        log.warning(
            "samples are drawn on the CPU: the ranks' --memory-budget leaves no room on the first "
            "GPU for a copy of the model (%.1f GiB)",
            model_bytes / (1 << 30),
        )
    return SamplerRoom("cpu", available_memory_bytes() - model_bytes)


def model_copy_bytes(shape: ModelShape, precision: str) -> int:
    """Return what the whole base model takes."""
    matrices = 1 if shape.tied_embeddings else 2
    elements = shape.num_layers * layer_weights(shape)
    return element_bytes(precision) * (elements + matrices * shape.vocab_size * shape.hidden_size)


def row_bytes(
    shape: ModelShape, precision: str, prompt_tokens: int, max_tokens: int, prompt_logprobs: bool
) -> int:
    """Return what a sequence takes while it is drawn.

    Keys and values of all its tokens, and logits in the model's type and in fp32, of all tokens of
    the prompt if their logprobs are wanted.
    """
    e = element_bytes(precision)
    cached = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * e
    logits = (e + 2 * FLOAT_BYTES) * shape.vocab_size * (prompt_tokens if prompt_logprobs else 1)
    return cached * (prompt_tokens + max_tokens) + logits
