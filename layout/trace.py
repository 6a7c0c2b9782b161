"""Replicas' time as a Chrome trace (chrome://tracing, Perfetto), measured or predicted.

A process is a replica. Its first row has the steps, the following ones what each pipeline stage
does in them, micro-batch by micro-batch, where that is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

TRACE_FILE = "trace.json"
STEPS_ROW = 0
FIRST_STAGE_ROW = 1
STEP_DETAILS = ("micro_batches", "padded_tokens", "predicted_s")  # of a replica's part in a step


@dataclass(frozen=True)
class Slice:
    """What takes a while, in seconds from the trace's start, and what else is known of it."""

    name: str
    start_s: float
    length_s: float
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplicaTrace:
    """One replica's rows: its steps, and per stage, where known, what the stage does."""

    name: str
    steps: Sequence[Slice]
    stages: Sequence[Sequence[Slice]] = ()


def trace_text(replicas: Iterable[ReplicaTrace]) -> str:
    """Return the trace as JSON; processes are numbered in the order of the replicas."""
    events: list[dict[str, Any]] = []
    for process, replica in enumerate(replicas):
        events.append(_name("process_name", process, STEPS_ROW, replica.name))
        rows = {"steps": replica.steps}
        rows |= {f"stage {number}": stage for number, stage in enumerate(replica.stages)}
        for row, (name, slices) in enumerate(rows.items()):
            events.append(_name("thread_name", process, row, name))
            events += [_event(process, row, one) for one in slices]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _name(kind: str, process: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}


def _event(process: int, row: int, one: Slice) -> dict[str, Any]:
    """Return a complete event; the format wants microseconds."""
    return {
        "name": one.name,
        "ph": "X",
        "pid": process,
        "tid": row,
        "ts": one.start_s * 1e6,
        "dur": one.length_s * 1e6,
        "args": dict(one.details),
    }
