"""Bytes a token and layer that the forward pass keeps for the backward pass.

One micro-batch of the job of `multi_lora` through the layers of one replica ``<1,1>``, under each
memory policy. Counted are the storages of the tensors that autograd saves, and on a GPU what the
allocator has more of after the forward pass than before: by how much they are more for a full
micro-batch than for half of one, so that what does not grow with the tokens (weights, copies of
adapters) is left out.
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
from lobra.layout.layout import Layout
from lobra.profiler.hardware import resolve_device


def activation_bytes(
    *,
    device: Device = "auto",
    job: JobName | None = None,
    tasks: int = 4,
    rank: int = 16,
    memory: tuple[str, ...] = ("keep", "lean", "full"),
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
        side.train(batch)  # what is made on first use is made
        kept.append(kept_bytes(*side.layers_of(batch)))
    small, large = kept
    places = (large["tokens"] - small["tokens"]) * job.model.layers
    slopes = {key: (large[key] - small[key]) / places for key in large if key != "tokens"}
    return {"tokens": large["tokens"], **slopes}


def kept_bytes(num_tokens: int, run_layers: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Run the layers and return the tokens and the bytes kept until the backward pass."""
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run_layers()
    found = {"tokens": num_tokens, "saved_bytes": sum(saved.values())}
    if output.is_cuda:
        found["allocated_bytes"] = torch.cuda.memory_allocated() - before
    return found
