"""What a side launches: from torch's profiler, kernels on a GPU, operators on a CPU."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.sides.side import COMPUTE
from lobra.common.files import atomic_path

OPERATOR, KERNEL, CALLS = "cpu_op", "kernel", ("cuda_runtime", "cuda_driver")  # of a trace
ANNOTATION = "user_annotation"
TORCH = "aten::"  # of its own operators, not of its autograd engine


@dataclass(frozen=True)
class Launch:
    """An operator's kernel, times in microseconds from the first launch on.

    On a CPU an operator is its own kernel: it starts when it is launched.
    """

    event: str
    launch_us: float
    kernel_start_us: float
    kernel_end_us: float


def launches_of(run: Callable[[], Any], device: str) -> list[Launch]:
    """Run a side's step and return what its forward and backward passes launched, in order."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    launched = kernels_of(events) if device == "cuda" else operators_of(events)
    found = sorted(during_passes(launched, events), key=lambda launch: launch.launch_us)
    start_us = found[0].launch_us if found else 0.0
    return [
        Launch(launch.event, *(time_us - start_us for time_us in astuple(launch)[1:]))
        for launch in found
    ]


def during_passes(launches: Iterable[Launch], events: Iterable[dict]) -> list[Launch]:
    """Return what was launched while a forward and backward pass was running."""
    passes = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == ANNOTATION and event["name"] == COMPUTE
    ]
    return [launch for launch in launches if any(a <= launch.launch_us < b for a, b in passes)]


def kernels_of(events: Iterable[dict]) -> list[Launch]:
    """Return the kernels, each with the call that launched it."""
    events = [event for event in events if event.get("ph") == "X"]
    launched_us = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in CALLS and "correlation" in event.get("args", {})
    }
    return [
        Launch(
            event["name"],
            launched_us.get(event["args"].get("correlation"), event["ts"]),
            event["ts"],
            event["ts"] + event["dur"],
        )
        for event in events
        if event.get("cat") == KERNEL
    ]


def operators_of(events: Iterable[dict]) -> list[Launch]:
    """Return the calls of torch's operators that are not made by another of them."""
    calls = [e for e in events if e.get("cat") == OPERATOR and e["name"].startswith(TORCH)]
    calls.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    found: list[Launch] = []
    thread, end_us = None, 0.0
    for call in calls:
        if call["tid"] != thread or call["ts"] >= end_us:
            thread, end_us = call["tid"], call["ts"] + call["dur"]
            found.append(Launch(call["name"], call["ts"], call["ts"], end_us))
    return found


def write_operators(path: Path, launches: Iterable[tuple[str, Launch]]) -> None:
    """Write launches, each with its side, as CSV."""
    with atomic_path(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["side", *(field.name for field in fields(Launch))])
        writer.writerows((side, *astuple(launch)) for side, launch in launches)
