"""A run's timeline as a Chrome trace (chrome://tracing, Perfetto): one row per replica."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic

TRACE_FILE = "trace.json"


def write_trace(folder: Path, steps: Sequence[dict[str, Any]]) -> Path:
    """Write `folder`/trace.json: what every replica computed in every step.

    Steps are laid end to end; times are microseconds, as the format wants them.
    """
    events: list[dict[str, Any]] = []
    widest = max(steps, key=lambda step: len(step["replicas"]))
    for index, replica in enumerate(widest["replicas"]):
        name = f"replica {index} {replica['layout']}"
        events.append(_meta("thread_name", index, {"name": name}))
    start_us = 0.0
    for step in steps:
        for index, replica in enumerate(step["replicas"]):
            events.append(
                {
                    "name": f"step {step['step']}",
                    "ph": "X",
                    "pid": 0,
                    "tid": index,
                    "ts": start_us,
                    "dur": replica["busy_s"] * 1e6,
                    "args": {
                        "micro_batches": replica["micro_batches"],
                        "padded_tokens": replica["padded_tokens"],
                        "predicted_s": replica["predicted_s"],
                    },
                }
            )
        start_us += step["step_time_s"] * 1e6
    path = folder / TRACE_FILE
    write_atomic(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return path


def _meta(kind: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": thread, "args": args}
