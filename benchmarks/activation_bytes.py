"""Bytes a token and layer that the forward pass keeps for the backward pass.

    python benchmarks/activation_bytes.py [--device cuda] [--job cuda] [--tasks 4] [--output FILE]

One micro-batch of the job of benchmarks/multi_lora.py through the layers of one replica ``<1,1>``,
under each memory policy. Counted is, on a GPU, what the allocator has more of after the forward
pass than before; on a CPU, where the policy keep is autograd's own, the storages that came to be
and still live. By how much it is more for a full micro-batch than for half of one: what does not
grow with the tokens (weights, copies of adapters) is left out.
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
from lobra.layout.layout import MEMORY_POLICIES, Layout  # noqa: E402
from lobra.profiler.hardware import describe_device, resolve_device, versions  # noqa: E402
from tests.model.alive import Alive  # noqa: E402


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


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every policy and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--job", choices=tuple(JOBS), help="default: the device's")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--memory", default=",".join(MEMORY_POLICIES), help="memory policies")
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
