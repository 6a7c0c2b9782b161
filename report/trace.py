"""A run's timeline as a Chrome trace: every replica's steps, laid end to end.

After a resume on another plan replica 0 is not what it was: each plan has its own replicas.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lobra.common.files import write_atomic
from lobra.layout.trace import STEP_DETAILS, TRACE_FILE, ReplicaTrace, Slice, trace_text
from lobra.report.run_plans import PlanPart


def write_trace(folder: Path, parts: Sequence[PlanPart]) -> Path:
    """Write `folder`/trace.json and return its path."""
    replicas, start_s = [], 0.0
    for part in parts:
        slices: list[list[Slice]] = [[] for _ in part.layouts]
        for step in part.steps:
            for own, replica in zip(slices, step["replicas"], strict=True):
                details = {name: replica[name] for name in STEP_DETAILS}
                own.append(Slice(f"step {step['step']}", start_s, replica["busy_s"], details))
            start_s += step["step_time_s"]
        plan = f"plan {part.number}: {part.plan}, {part.span}: " if len(parts) > 1 else ""
        replicas += [
            ReplicaTrace(f"{plan}replica {index} {layout}", own)
            for index, (layout, own) in enumerate(zip(part.layouts, slices, strict=True))
        ]
    path = folder / TRACE_FILE
    write_atomic(path, trace_text(replicas))
    return path
