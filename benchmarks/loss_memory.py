"""Peak memory and time of the loss: all tokens' logits at once against a few tokens at a time.

    python benchmarks/loss_memory.py [--tokens 4096] [--hidden 1024] [--precision fp32/bf16]

Both compute the cross-entropy of random hidden states under a frozen head and its gradient with
respect to them: torch's own on the whole logits, and the trainer's, in chunks. Each runs in a
process of its own; the peak is what the process's resident memory rose by (CPU), or what the
allocator had at most (GPU).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from lobra.model.tensor_parallel import VocabParallelHead  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 1 << 20


def run(kind: str, args: argparse.Namespace, results: object) -> None:
    """Put (peak bytes, seconds, gradient norm) of one way into `results`."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[args.precision]
    hidden = torch.randn(args.tokens, args.hidden, generator=generator).to(device, dtype)
    weight = (0.02 * torch.randn(args.vocab, args.hidden, generator=generator)).to(device, dtype)
    targets = torch.randint(0, args.vocab, (args.tokens,), generator=generator).to(device)
    hidden.requires_grad_(True)
    compute = {"whole": _whole, "chunks": _in_chunks}[kind]
    compute(hidden[:16], weight, targets[:16]).backward()  # libraries load on first use
    hidden.grad = None
    before = _start(device)
    begin = time.perf_counter()
    compute(hidden, weight, targets).backward()
    peak = _peak(device) - before
    assert hidden.grad is not None
    results.put((peak, time.perf_counter() - begin, float(hidden.grad.float().norm())))  # type: ignore[attr-defined]


def _whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, targets, reduction="mean")


def _in_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    factors = torch.full((len(targets),), 1.0 / len(targets), device=hidden.device)
    head = VocabParallelHead(weight, range(len(weight)), None, len(weight))
    return head.loss(hidden, targets, factors)[0]


def _start(device: torch.device) -> int:
    """Forget earlier peaks; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> int:
    """Run both and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{'logits':>10}{'peak MiB':>12}{'seconds':>10}{'gradient norm':>16}")
    for kind in ("whole", "chunks"):
        results = context.Queue()
        process = context.Process(target=run, args=(kind, args, results))
        process.start()
        peak, seconds, norm = results.get()
        process.join()
        print(f"{kind:>10}{peak / MIB:>12,.0f}{seconds:>10.2f}{norm:>16.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
