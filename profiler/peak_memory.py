"""How much memory this process takes at its peak while something runs.

On CUDA torch's allocator says it. On a CPU it is the kernel's high-water mark of the resident
memory, which is set back to the present through `/proc/self/clear_refs`; where that is not
allowed, a thread looks every millisecond.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
RESET_HIGH_WATER_MARK = "5"  # proc(5), clear_refs
SAMPLE_INTERVAL_S = 0.001


def peak_bytes_of(run: Callable[[], None], device: str) -> int:
    """Run a function and return the most memory taken meanwhile beyond what was taken before.

    Bytes of this process: resident memory on a CPU, allocated device memory on CUDA.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = status_bytes("VmRSS")
    try:
        CLEAR_REFS.write_text(RESET_HIGH_WATER_MARK, encoding="ascii")
    except OSError:
        return max(0, _sampled_peak_bytes(run) - before)
    run()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(field: str) -> int:
    """Return a memory field of `/proc/self/status` in bytes."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}; memory is measured on Linux only")


def _sampled_peak_bytes(run: Callable[[], None]) -> int:
    peak = status_bytes("VmRSS")
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(SAMPLE_INTERVAL_S):
            peak = max(peak, status_bytes("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        ended.set()
        watcher.join()
    return max(peak, status_bytes("VmRSS"))
