"""What a profile was measured on: the machine and the versions, for the sidecar of the file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, Literal

from lobra.common.errors import ConfigError
from lobra.layout.base_precision import FP8

PACKAGES = ("torch", "transformers", "numpy")
DEVICES = ("auto", "cpu", "cuda")
FP8_VERSION = (8, 9)  # the compute capability from which on a GPU multiplies e4m3: Ada, Hopper


def resolve_device(device: str) -> Literal["cpu", "cuda"]:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises
    ------
    ConfigError
        If the name is unknown, or "cuda" is asked for where torch sees no such device.
    """
    if device not in DEVICES:
        raise ConfigError(f"device {device!r}: one of {', '.join(DEVICES)} is expected")
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ConfigError("device 'cuda': torch sees no CUDA device here; use --device cpu")
    return "cpu"


def num_devices(device: str) -> int | None:
    """Return how many ranks can run at once: the GPUs, or None (any number) on a CPU."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.device_count()


def describe_device(device: str) -> dict[str, Any]:
    """Return name, size and number of what was measured on.

    A CPU: its name and cores. A GPU: its name, memory in bytes and number.
    """
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return {
            "device": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "num_devices": torch.cuda.device_count(),
        }
    return {"device": "cpu", "name": cpu_name(), "num_cores": num_cores()}


def num_cores() -> int:
    """Return the CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def product_problem(quantised: str | None, device: str | None) -> str | None:
    """Return why a device cannot multiply by a base that is kept so, None if it can."""
    if quantised != FP8 or device != "cuda":
        return None
    import torch

    version = torch.cuda.get_device_capability()
    if version >= FP8_VERSION:
        return None
    has, wants = (".".join(map(str, one)) for one in (version, FP8_VERSION))
    return (
        f"--base-precision fp8: {torch.cuda.get_device_name()} has no products in fp8 (its compute "
        f"capability is {has}, {wants} is needed): int8 takes as little memory"
    )


def available_memory_bytes() -> int:
    """Return the memory processes may still take on this machine, in bytes (Linux, macOS)."""
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that do the computing."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
