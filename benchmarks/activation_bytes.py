"""Bytes a token and layer that the forward pass keeps for the backward pass.

    python benchmarks/activation_bytes.py [--device cuda] [--job cuda] [--tasks 4] [--output FILE]

One micro-batch of the job of benchmarks/multi_lora.py through the layers of one replica ``<1,1>``,
under each memory policy. Counted are the storages of the tensors that autograd saves, and on a GPU
what the allocator has more of after the forward pass than before: by how much they are more for a
full micro-batch than for half of one, so that what does not grow with the tokens (weights, copies
of adapters) is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.sides.base import first_fit_decreasing  # noqa: E402
from benchmarks.sides.job import JOBS, save_model  # noqa: E402
from benchmarks.sides.lengths import find_lengths  # noqa: E402
from benchmarks.sides.side import Setting, weights_dtype  # noqa: E402
from lobra.common.files import write_atomic  # noqa: E402
from lobra.layout.layout import Layout  # noqa: E402
from lobra.profiler.hardware import describe_device, resolve_device, versions  # noqa: E402


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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every policy and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--job", choices=tuple(JOBS), help="default: the device's")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", default="keep,full", help="memory policies")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    os.environ.setdefault("LOCAL_RANK", "0")  # deepspeed asks for it
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    job = JOBS[args.job or device]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        save_model(job.model, folder, weights_dtype(device), device)
        store = dist.FileStore(f"{name}/store", 1)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        for memory in args.memory.split(","):
            found[memory] = measure(Setting(folder, job, args.tasks, args.rank, device), memory)
            words = (f"{key} {value:,.0f}" for key, value in found[memory].items())
            print(f"{memory}: {', '.join(words)}", flush=True)
        dist.destroy_process_group()
    if args.output:
        about = {"device": describe_device(device), "versions": versions(), "tasks": args.tasks}
        write_atomic(args.output, json.dumps({**about, "policies": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
