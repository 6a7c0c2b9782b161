"""All sides of the comparison compute the same losses, and the rows' arithmetic is right."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.sides.base import PackedAttention, first_fit_decreasing
from benchmarks.sides.job import JOBS, ModelSizes, step_flops
from benchmarks.sides.lengths import find_lengths
from benchmarks.sides.operators import Launch, during_passes, kernels_of, operators_of
from benchmarks.sides.result import Result, TimedStep, rows_of
from benchmarks.sides.side import COMPUTE, Trained
from benchmarks.sides.switching import rows_by_length, rows_in_turn
from lobra.common.errors import ConfigError
from lobra.layout.sequences import Sequence

COMMAND = [sys.executable, "-m", "benchmarks", "multi_lora", "--device", "cpu", "--job", "tiny"]
COMMAND += ["--threads", "1"]


def sequences_of(lengths: list[int]) -> list[Sequence]:
    return [
        Sequence(0, index, np.arange(length, dtype=np.int32), np.arange(1, length, dtype=np.int32))
        for index, length in enumerate(lengths)
    ]


@pytest.mark.long
def test_all_sides_compute_the_same_losses(project_root: Path, tmp_path: Path) -> None:
    """Fresh adapters change nothing; after updates ours has PEFT's losses, the base its own."""
    output, operators = tmp_path / "out.json", tmp_path / "operators.csv"
    subprocess.run(
        [*COMMAND, "--tasks", "3", "--steps", "2", "--json", output, "--operators", operators],
        cwd=project_root, check=True, timeout=300,
    )  # fmt: skip
    found = json.loads(output.read_text())
    rows = {row["side"]: row for row in found["rows"][1:]}
    assert set(rows) == {"base", "ours", "peft-switching", "peft-sorted"}
    losses = {
        side: np.array([step["trained"]["losses"] for step in row["steps"]])
        for side, row in rows.items()
    }
    for side in rows:
        np.testing.assert_allclose(
            rows[side]["first_losses"], rows["base"]["first_losses"], rtol=1e-5
        )
        assert losses[side].shape == (2, 3)
    for side in ("peft-switching", "peft-sorted"):
        np.testing.assert_allclose(losses["ours"], losses[side], rtol=2e-5)
    trained_by = np.abs(losses["ours"] - losses["base"])[-1]
    assert trained_by.max() > 20 * np.abs(losses["ours"] - losses["peft-sorted"]).max()

    assert rows["base"]["share"] == rows["base"]["padded_per_real"] == 1.0
    with operators.open(encoding="utf-8") as file:
        launches = list(csv.DictReader(file))
    for side, row in rows.items():
        own = [launch for launch in launches if launch["side"] == f"{side}, 3 tasks of rank 16"]
        assert len(own) == row["launches"] > 0
        assert min(float(launch["launch_us"]) for launch in own) == 0.0
        assert {"aten::linear", "aten::mm"} <= {launch["event"] for launch in own}


@pytest.mark.long
def test_an_interrupted_run_keeps_what_there_is(project_root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    arguments = ["--sides", "base", "--tasks", "4", "--steps", "1000", "--json", str(output)]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=project_root,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while "[4/" not in (line := process.stderr.readline()):
        assert line and time.monotonic() < deadline, "it never came to its third step"
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens_per_s" in printed
    assert json.loads(output.read_text())["rows"][1]["tokens_per_s"] > 0


def test_all_mistakes_at_once(project_root: Path) -> None:
    wrong = ["--tasks", "1", "--tasks", "0", "--rank", "-3", "--sides", "theirs", "--steps", "0"]
    wrong += ["--peft-tasks", "7"]
    done = subprocess.run(
        [*COMMAND, *wrong, "--sequences", "6", "--cap", "1"],
        cwd=project_root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    for word in (
        "--tasks 0",
        "--rank -3",
        "'theirs'",
        "--peft-tasks: 7",
        "--steps 0",
        "--sequences: 6",
        "--cap 1",
    ):
        assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_numbers_of_tasks_share_the_same_tokens() -> None:
    job = JOBS["tiny"]
    lengths = find_lengths(job.datasets)
    one, many = job.step(lengths, 5, 1), job.step(lengths, 5, 16)
    assert [s.tokens.tolist() for s in one] == [s.tokens.tolist() for s in many]
    assert {s.task for s in one} == {0}
    assert [s.task for s in many] == list(range(16))


def test_unknown_lengths_are_a_users_mistake(tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    path.write_text('{"xsum": [1, 2]}')
    with pytest.raises(ConfigError, match="dolly_3k"):
        find_lengths(("xsum", "dolly_3k"), path)


def test_micro_batches_hold_every_sequence_once_and_no_more_than_they_may() -> None:
    step = sequences_of([5, 40, 3, 17, 9, 33, 64, 2, 21])
    for batches in (first_fit_decreasing(step, 64), rows_by_length(step, 64)):
        assert sorted(s.index for batch in batches for s in batch) == list(range(len(step)))
    assert all(sum(len(s.tokens) for s in b) <= 64 for b in first_fit_decreasing(step, 64))
    assert all(max(len(s.tokens) for s in b) * len(b) <= 64 for b in rows_by_length(step, 64))
    assert len(first_fit_decreasing(step, 64)) == 4  # 194 tokens
    assert [len(batch) for batch in rows_in_turn(4, step, 64)] == [4, 4, 1]


def test_packed_attention_is_that_of_each_sequence_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 7, 1, 4, 4, 4, 9]
    query = torch.randn(1, 4, sum(lengths), 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, sum(lengths), 8, generator=generator, dtype=torch.float64)
    attention = PackedAttention()
    attention.pack(lengths, torch.device("cpu"))
    packed = attention(None, query, key, value, None)[0]
    alone = [
        functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)
        for part in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2).transpose(1, 2))


def test_operations_of_a_step() -> None:
    """Counted by hand: one layer of hidden size 2 and ffn size 3, a vocabulary of 5."""
    sizes = ModelSizes(hidden=2, ffn=3, layers=1, heads=1, kv_heads=1, vocabulary=5)
    weights = 4 * 2 * 2 + 3 * 2 * 3
    tokens, labels, squares = 3 + 4, 2 + 3, 9 + 16
    attention = 6 * 2 * squares
    assert (
        step_flops(sizes, sequences_of([3, 4]))
        == 4 * (weights * tokens + 2 * 5 * labels) + attention
    )


def test_a_kernel_is_launched_by_the_call_of_its_correlation() -> None:
    def event(cat: str, name: str, ts: float, **args: int) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 2.0, "tid": 1, "args": args}

    events = [
        event("cpu_op", "aten::mm", 0.0),
        event("cuda_runtime", "cudaLaunchKernel", 1.0, correlation=7),
        event("cuda_driver", "cuLaunchKernelEx", 4.0, correlation=8),
        event("kernel", "gemm", 10.0, correlation=7),
        event("kernel", "fused", 12.5, correlation=8),
        event("gpu_memcpy", "copy", 20.0, correlation=9),
        {"ph": "M", "name": "process_name"},
    ]
    assert kernels_of(events) == [Launch("gemm", 1.0, 10.0, 12.0), Launch("fused", 4.0, 12.5, 14.5)]


def test_what_is_launched_between_the_passes_is_not_counted() -> None:
    passes = [
        {"cat": "user_annotation", "name": COMPUTE, "ts": ts, "dur": 10.0} for ts in (5.0, 30.0)
    ]
    other = {"cat": "user_annotation", "name": "other", "ts": 0.0, "dur": 90.0}
    launches = [Launch("mm", float(at), float(at), at + 1.0) for at in (4, 5, 14, 15, 31)]
    inside = during_passes(launches, [*passes, other])
    assert [launch.launch_us for launch in inside] == [5.0, 14.0, 31.0]


def test_operators_that_others_call_are_not_counted() -> None:
    spans = [("aten::linear", 0, 9), ("aten::addmm", 1, 8), ("aten::mm", 9, 3), ("autograd", 0, 20)]
    events = [
        {"cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": thread}
        for thread in (1, 2)
        for name, ts, dur in spans
    ]
    found = operators_of(events)
    assert [launch.event for launch in found] == ["aten::linear", "aten::mm"] * 2


def test_a_row_divides_by_the_limit_of_the_same_steps_and_tasks() -> None:
    def result(side: str, num_tasks: int, times_s: dict[int, float], padded: int) -> Result:
        steps = [
            TimedStep(number, 100, 4e12, Trained(time_s, time_s / 2, (1.0,), 4, padded))
            for number, time_s in times_s.items()
        ]
        return Result(side, num_tasks, 16, steps=steps)

    base = result("base", 4, {1: 1.0, 2: 2.0, 3: 4.0}, 100)
    ours = result("ours", 4, {1: 2.0, 3: 5.0}, 125)
    ours.held_bytes, ours.step_bytes = 3 << 20, 2 << 20
    lost = result("peft-sorted", 4, {}, 0)
    lost.failure = "out of memory"
    other = result("ours", 8, {1: 2.0}, 100)
    rows = {(r["side"], r["tasks"]): r for r in rows_of([ours, base, lost, other])}
    row = rows["ours", 4]
    assert row["tokens_per_s"] == pytest.approx((50 + 20) / 2)
    assert row["tflops"] == pytest.approx((2.0 + 0.8) / 2)
    assert row["share"] == pytest.approx((1 / 2 + 4 / 5) / 2)
    assert row["compute_share"] == pytest.approx(1 / 1 / 2 + 4 / 2.5 / 2)
    assert row["padded_per_real"] == 1.25
    assert row["peak_mib"] == 5.0
    assert row["micro_batch_ms"] == pytest.approx(1e3 * (0.5 + 1.25) / 2)
    assert rows["ours", 8]["share"] is None, "no limit was measured with 8 tasks"
    lost_row = rows["peft-sorted", 4]
    assert (lost_row["failure"], lost_row["tokens_per_s"]) == ("out of memory", None)
