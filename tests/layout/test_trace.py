from __future__ import annotations

import json

from lobra.layout.trace import ReplicaTrace, Slice, trace_text


def test_a_process_per_replica_a_row_for_its_steps_and_each_stage_in_microseconds() -> None:
    stages = [[Slice("1 x 64", 0.0, 2.0)], [Slice("bubble", 0.0, 2.0)]]
    step = Slice("step 3", 0.5, 4.0, {"micro_batches": 1})
    replicas = [ReplicaTrace("replica 0 <1,2>", [step], stages), ReplicaTrace("replica 1", [])]
    events = json.loads(trace_text(replicas))["traceEvents"]
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows == {(0, 0): "steps", (0, 1): "stage 0", (0, 2): "stage 1", (1, 0): "steps"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "replica 0 <1,2>",
        "replica 1",
    ]
    whole, *_ = (event for event in events if event["ph"] == "X")
    assert (whole["name"], whole["ts"], whole["dur"]) == ("step 3", 500_000.0, 4_000_000.0)
    assert whole["args"] == {"micro_batches": 1}
