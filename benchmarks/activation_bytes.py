"""Bytes a token and layer that the forward pass keeps for the backward pass.

One micro-batch of the job of `multi_lora` through the layers of one replica ``<1,1>``, under each
memory policy. Counted is, on a GPU, what the allocator has more of after the forward pass than
before; on a CPU, where the policy keep is autograd's own, the storages that came to be and still
live. By how much it is more for a full micro-batch than for half of one: what does not grow with
the tokens (weights, copies of adapters) is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.sides.base import first_fit_decreasing
from benchmarks.sides.job import JOBS, JobName, save_model
from benchmarks.sides.lengths import find_lengths
from benchmarks.sides.side import Setting, alone_on, weights_dtype
from lobra.common.options import Device
from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.profiler.hardware import resolve_device
from tests.model.alive import Alive


def activation_bytes(
    *,
    device: Device = "auto",
    job: JobName | None = None,
    tasks: int = 4,
    rank: int = 16,
    memory: tuple[str, ...] = MEMORY_POLICIES,
) -> Iterator[dict[str, Any]]:
    """Run a micro-batch's forward pass under memory policies and count what it keeps.

    Parameters
    ----------
    job
        Sizes of the model and of the micro-batch; by default the device's.
    tasks
        Number of adapters.
    rank
        Of the adapters.
    memory
        The policies.
    """
    device = resolve_device(device)
    sizes = JOBS[job or device]
    with tempfile.TemporaryDirectory() as name, alone_on(device):
        folder = Path(name) / "model"
        save_model(sizes.model, folder, weights_dtype(device), device)
        for policy in memory:
            setting = Setting(folder, sizes, tasks, rank, device)
            yield {"device": device, "memory": policy, **measure(setting, policy)}


def measure(setting: Setting, memory: str) -> dict[str, float]:
    """Return what a token and layer keeps: by how much a larger micro-batch keeps more."""
    from benchmarks.sides.ours import Ours  # brings in deepspeed, which must know its device first

    side = Ours(setting, Layout(1, 1, memory=memory))
    job = setting.job
    step = job.step(find_lengths(job.datasets), 0, setting.num_tasks)
    kept = []
    for max_tokens in (job.max_tokens // 2, job.max_tokens):
        batch = first_fit_decreasing(step, max_tokens)[0]
        batch.sort(key=lambda sequence: sequence.index)
        num_tokens, run_layers = side.layers_of(batch)
        run_layers()  # what is made on first use is made
        kept.append((num_tokens, kept_bytes(run_layers)))
    (fewer, less), (num_tokens, more) = kept
    return {
        "tokens": num_tokens,
        "kept_bytes": (more - less) / (num_tokens - fewer) / job.model.layers,
    }


def kept_bytes(run_layers: Callable[[], torch.Tensor]) -> int:
    """Run the layers and return the bytes kept until the backward pass."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        output = run_layers()
        return torch.cuda.memory_allocated() - before
    with Alive() as alive:
        output = run_layers()
        assert output.requires_grad
        return alive.num_bytes()
