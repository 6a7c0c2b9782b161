"""A run's timeline as a Chrome trace (chrome://tracing, Perfetto): one row per replica.

Each plan the run has had is a process of its own, since replica 0 of one is not that of another.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic
from lobra.report.run_plans import PlanPart

TRACE_FILE = "trace.json"


def write_trace(folder: Path, parts: Sequence[PlanPart]) -> Path:
    """Write `folder`/trace.json: what every replica computed in every step.

    Steps are laid end to end; times are microseconds, as the format wants them.
    """
    events: list[dict[str, Any]] = []
    for part in parts:
        name = f"plan {part.number}: {part.plan}, {part.span}"
        events.append(_meta("process_name", part.number, 0, name))
        for index, layout in enumerate(part.layouts):
            name = f"replica {index} {layout}"
            events.append(_meta("thread_name", part.number, index, name))
    start_us = 0.0
    for part, step in ((own, step) for own in parts for step in own.steps):
        for index, replica in enumerate(step["replicas"]):
            events.append(
                {
                    "name": f"step {step['step']}",
                    "ph": "X",
                    "pid": part.number,
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


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
