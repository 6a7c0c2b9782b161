"""A log in parts is read, and goes on, as if it were one file."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lobra.common.errors import ConfigError
from lobra.trainer import log_parts
from lobra.trainer.log_parts import METRICS_FILE, log_files
from lobra.trainer.metrics import (
    MetricsFile,
    ReplicaMetrics,
    kept_metrics,
    read_metrics,
    restore_metrics,
)
from lobra.trainer.restarts import forget_steps
from lobra.trainer.run_folder import occupied
from tests.trainer.test_forecast import step

STEPS = 30
MOST_BYTES = 6000  # of lines of some 800


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_parts, "MOST_BYTES", MOST_BYTES)


def write(folder: Path, begin: int, end: int) -> None:
    """Log some steps of a run."""
    replica = ReplicaMetrics("<1,1>", 1.0, 1.0, 1.0, 1, 3)
    file = MetricsFile(folder)
    for number in range(begin, end):
        file.write(replace(step({"a": 1.0 + number}, 2.0), step=number, replicas=[replica]))
    file.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of `STEPS` steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder, 0, STEPS)
    return folder


def numbers(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(folder)]


def test_the_newest_lines_are_in_metrics_jsonl(run: Path) -> None:
    *parts, newest = log_files(run)
    assert len(parts) > 2 and newest.name == METRICS_FILE
    assert all(path.stat().st_size <= MOST_BYTES for path in (*parts, newest))
    assert numbers(run) == list(range(STEPS))
    assert json.loads(newest.read_text().splitlines()[-1])["step"] == STEPS - 1
    unpacked = gzip.decompress(parts[0].read_bytes()).splitlines()
    assert parts[0].name == f"metrics.until_{len(unpacked)}.jsonl.gz"


@pytest.mark.parametrize("knows_last", [True, False])
def test_a_run_goes_on_from_any_step(run: Path, knows_last: bool, tmp_path: Path) -> None:
    lines = read_metrics(run)
    ends = log_parts.log_parts(run).keys()
    for number in (0, 1, *sorted(ends), min(ends) + 1, STEPS):
        copy = Path(shutil.copytree(run, tmp_path / f"from_{number}"))
        last = lines[number - 1] if knows_last and number else None
        assert kept_metrics(copy, number, last).missing(number) == []
        restore_metrics(copy, number, last)
        assert read_metrics(copy) == lines[:number]
        write(copy, number, STEPS)
        assert read_metrics(copy) == lines
        assert not list(copy.glob("*.damaged"))


def test_a_last_line_that_was_not_written_comes_back(run: Path) -> None:
    lines = read_metrics(run)
    newest = run / METRICS_FILE
    newest.write_text("".join(newest.read_text().splitlines(keepends=True)[:-1]))
    restore_metrics(run, STEPS, lines[-1])
    assert read_metrics(run) == lines


@pytest.mark.parametrize("damage", ["cut", "bent", "no gzip", "another step"])
def test_a_damaged_part_is_set_aside(run: Path, damage: str) -> None:
    lines = read_metrics(run)
    part = log_files(run)[1]
    content = part.read_bytes()
    if damage == "cut":
        part.write_bytes(content[:50])
    elif damage == "bent":
        part.write_bytes(content[:40] + bytes(40) + content[80:])
    elif damage == "no gzip":
        part.write_bytes(b"hello\n")
    else:
        part.write_bytes(gzip.compress(b'{"step": 3}\n'))
    with pytest.raises(ConfigError, match=part.name):
        read_metrics(run)
    kept = kept_metrics(run, STEPS, lines[-1])
    assert part.name in str(kept.damage) and kept.missing(STEPS)
    restore_metrics(run, STEPS, lines[-1])
    assert set(numbers(run)) == set(kept.steps)
    assert [entry for entry in lines if entry["step"] in kept.steps] == read_metrics(run)
    assert (run / f"{part.name}.damaged").exists()


def test_a_part_that_could_not_be_packed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def deny(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(log_parts, "write_atomic", deny)
        write(tmp_path, 0, STEPS)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert not list(tmp_path.glob("*.gz"))
    assert numbers(tmp_path) == list(range(STEPS))
    # A crash between the two leaves both, of which one counts.
    plain = log_files(tmp_path)[0]
    (tmp_path / f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    assert numbers(tmp_path) == list(range(STEPS))
    restore_metrics(tmp_path, 2, None)
    assert numbers(tmp_path) == [0, 1]
    forget_steps(tmp_path)
    assert log_files(tmp_path) == []


def test_a_run_with_parts_alone_is_a_run(run: Path) -> None:
    (run / METRICS_FILE).unlink()
    (problem,) = occupied(run)
    assert "holds a run without a checkpoint" in problem
    forget_steps(run)
    assert log_files(run) == []
