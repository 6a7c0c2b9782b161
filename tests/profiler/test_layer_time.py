"""Timing on two real ranks: rows appear, killed sweeps continue, costs are counted per layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lobra.common.errors import ConfigError
from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.layout.shapes import read_shape
from lobra.layout.world import one_replica
from lobra.model.adapted_linear import AdaptedLinear
from lobra.model.launch import run_ranks
from lobra.model.micro_batch import MicroBatchTensors
from lobra.model.rank_results import RankError
from lobra.model.stack import Stack
from lobra.model.stage import Stage
from lobra.profiler import layer_time
from lobra.profiler.layer_time import TimeSweep, missing_shapes, open_files, sweep_time
from lobra.profiler.layer_time_rank import SingleDevice, time_shapes_on_rank
from lobra.profiler.profiles import load_time_profile, load_time_profiles
from lobra.profiler.sidecar import read_meta
from lobra.profiler.sweep_rows import SweepFile
from lobra.tasks.config import TaskConfig
from tests.model.support import save_llama

Files = tuple[SweepFile, SweepFile]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> TimeSweep:
    folder = save_llama(tmp_path_factory.mktemp("model") / "llama")
    return TimeSweep(folder, read_shape(folder), (1, 2), 64, 64, 2, 2, 4, "fp32", "cpu")


def opened(sweep: TimeSweep, folder: Path) -> Files:
    return open_files(sweep, folder / "t.csv", folder / "h.csv", "never", {})


@pytest.mark.ranks
def test_real_ranks_fill_both_files_and_continue(sweep: TimeSweep, tmp_path: Path) -> None:
    first = replace(sweep, tps=(2,))
    assert missing_shapes(first, 2, opened(first, tmp_path)) == ((1, 64),)
    sweep_time(first, opened(first, tmp_path))
    before = (tmp_path / "t.csv").read_bytes(), (tmp_path / "h.csv").read_bytes()

    reports: list[tuple[int, int]] = []
    layers, head = sweep_time(
        sweep, opened(sweep, tmp_path), lambda tp, left: reports.append((tp, left))
    )
    for name, content in zip(("t.csv", "h.csv"), before, strict=True):
        assert (tmp_path / name).read_bytes().startswith(content), "rows measured before stay"
        profile = load_time_profile(tmp_path / name)
        shapes = list(zip(profile.tp, profile.mbs, profile.seq_len, strict=True))
        assert sorted(shapes) == [(1, 1, 64), (2, 1, 64)]
        assert (profile.time_ms > 0.01).all()
        details = read_meta(tmp_path / name)["rows"]["1,64,1"]
        assert details["repeats"] >= 3
        assert details["spread"] >= 0
    assert reports[0] == (1, 1)
    assert reports[-1] == (2, 0)
    assert missing_shapes(sweep, 1, (layers, head)) == ()


@pytest.mark.ranks
def test_a_quick_sweep_runs_less_and_is_not_mixed_with_a_thorough_one(
    sweep: TimeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TaskConfig("one", 4, 4.0, ("q_proj",), 4, "none", 512)
    tasks = (task, replace(task, name="other", rank=8))
    quick = replace(sweep, tps=(1,), load_ranks=0, tasks=tasks, quick=True, max_seq_length=256)
    assert len(quick.grid) < len(replace(quick, quick=False).grid)
    monkeypatch.setattr(layer_time, "doubtful_shapes", lambda *_: pytest.fail("none is doubted"))
    layers, _ = sweep_time(quick, opened(quick, tmp_path))
    assert set(layers.done) == {(1, s, b) for b, s in quick.grid}
    assert all("attempts" not in layers.details(key) for key in layers.done)
    with pytest.raises(ConfigError, match="quick was true, is now not given"):
        opened(replace(quick, quick=False), tmp_path)


@pytest.mark.ranks
def test_only_what_sticks_out_is_measured_again(sweep: TimeSweep, tmp_path: Path) -> None:
    sweep = replace(sweep, tps=(1,), load_ranks=0, max_seq_length=256, max_tokens=512)
    layers, head = opened(sweep, tmp_path)
    wrong = sweep.grid[len(sweep.grid) // 2]
    for b, s in sweep.grid:
        time_ms = 1.0 + 0.001 * b * s
        layers.add((1, s, b, time_ms * (5 if (b, s) == wrong else 1)), {"spread": 0.0})
        head.add((1, s, b, 0.1, time_ms), {"spread": 0.0})
    before = head.path.read_bytes()
    layers, _ = sweep_time(sweep, (layers, head))
    assert 2 <= len(layers.details((1, wrong[1], wrong[0]))["attempts"]) <= 3
    assert set(layers.done) == {(1, s, b) for b, s in sweep.grid}
    assert head.path.read_bytes() == before


def test_running_out_of_memory_leaves_the_point_out(
    sweep: TimeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = replace(sweep, tps=(1,), max_tokens=256)
    asked: list[tuple[tuple[int, int], ...]] = []

    def ranks(target, world_size, kwargs, **options) -> None:
        asked.append(kwargs["shapes"])
        for b, s in kwargs["shapes"]:
            if b == 4:
                raise RankError(0, "torch.OutOfMemoryError: CUDA out of memory")
            for file in (kwargs["layer_file"], kwargs["head_file"]):
                times = [1.0] * (len(file.columns) - 3)
                file.add((1, s, b, *times), {"spread": 0.0, "repeats": 3})

    monkeypatch.setattr(layer_time, "run_ranks", ranks)
    files = sweep_time(sweep, opened(sweep, tmp_path))
    assert files[0].skipped == {(1, 64, 4)}
    assert asked == [((1, 64), (4, 64))]
    sweep_time(sweep, opened(sweep, tmp_path))
    assert len(asked) == 1, "a shape left out is not tried again"


def test_rows_of_other_links_are_not_continued(sweep: TimeSweep, tmp_path: Path) -> None:
    shard = SingleDevice(2, (0.1, 0.001), (0.05, 0.0005))
    sweep = replace(sweep, tps=(2,), load_ranks=0, single_device=(shard,), links="of an A100")
    opened(sweep, tmp_path)[0].add((2, 64, 1, 1.0), {"spread": 0.0})
    with pytest.raises(ConfigError, match='links was "of an A100", is now "of an H100"'):
        opened(replace(sweep, links="of an H100"), tmp_path)


def test_another_failure_is_raised(
    sweep: TimeSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranks(*args, **options) -> None:
        raise RankError(0, "ZeroDivisionError")

    monkeypatch.setattr(layer_time, "run_ranks", ranks)
    with pytest.raises(RankError, match="ZeroDivisionError"):
        sweep_time(sweep, opened(sweep, tmp_path))


def dropouts_on_rank(sweep: TimeSweep, files: Files) -> int:
    """Return from how many linears' inputs something drops out while a shape is timed."""
    drawn: list[int] = []
    plain = Stack.dropouts

    def counted(self: Any, linears: Any, *args: Any) -> Any:
        drawn.extend(linears)
        return plain(self, linears, *args)

    Stack.dropouts = counted  # type: ignore[method-assign]
    time_shapes_on_rank(
        sweep.folder,
        one_replica(Layout(1, 1)),
        sweep.specs,
        sweep.grid,
        "fp32",
        "cpu",
        *files,
    )
    return len(drawn)


@pytest.mark.ranks
def test_layers_are_timed_with_their_dropout(sweep: TimeSweep, tmp_path: Path) -> None:
    task = TaskConfig("one", 4, 4.0, ("q_proj", "up_proj"), 4, "none", 512)
    counts = []
    for dropout in (0.0, 0.1):
        tasks = (replace(task, lora_dropout=dropout),)
        dropping = replace(sweep, tps=(1,), load_ranks=0, tasks=tasks)
        files = opened(dropping, tmp_path / str(dropout))
        arguments = {"sweep": dropping, "files": files}
        counts += run_ranks("tests.profiler.test_layer_time:dropouts_on_rank", 1, arguments)
    assert counts[0] == 0
    repeats = read_meta(tmp_path / "0.1/t.csv")["rows"]["1,64,1"]["repeats"]
    passes = repeats + 1  # a warm-up is the first
    assert counts[1] == 4 * 2 * passes, "layers x linears x passes"
    with pytest.raises(ConfigError, match="lora_dropout was not given, is now"):
        opened(dropping, tmp_path / "0.0")


def forwards_on_rank(sweep: TimeSweep, files: Files) -> int:
    """Return how often a linear of a layer runs forward while a shape is timed."""
    calls: list[int] = []
    plain = AdaptedLinear.forward

    def counted(self: Any, x: Any) -> Any:
        calls.append(1)
        return plain(self, x)

    hidden = Stage.hidden

    def packed(self: Any, batch: MicroBatchTensors, *args: Any) -> Any:
        assert batch.packing is not None, "as is trained by default"
        return hidden(self, batch, *args)

    AdaptedLinear.forward = counted  # type: ignore[method-assign]
    Stage.hidden = packed  # type: ignore[method-assign]
    world = one_replica(Layout(1, 1, memory=sweep.memory))
    time_shapes_on_rank(sweep.folder, world, sweep.specs, sweep.grid, "fp32", "cpu", *files)
    return len(calls)


@pytest.mark.ranks
def test_layers_computed_again_are_timed_so(sweep: TimeSweep, tmp_path: Path) -> None:
    """All kinds of rows in one file; embedding and head, which are the same, once."""
    sweep = replace(sweep, tps=(1,), load_ranks=0)
    passes, before = [], b""
    for memory in MEMORY_POLICIES:
        own = replace(sweep, memory=memory)
        files = opened(own, tmp_path)
        arguments = {"sweep": own, "files": files}
        (calls,) = run_ranks("tests.profiler.test_layer_time:forwards_on_rank", 1, arguments)
        repeats = opened(own, tmp_path)[0].details((1, 64, 1))["repeats"]
        passes.append(calls / (4 * 7 * (repeats + 1)))
        before = before or (tmp_path / "h.csv").read_bytes()
    assert passes[0] == 1.0
    assert all(1.8 < again <= 2.0 for again in passes[1:]), "the last linear need not run again"
    assert (tmp_path / "h.csv").read_bytes() == before
    assert set(load_time_profiles(tmp_path / "t.csv")) == set(MEMORY_POLICIES)


def test_all_mistakes_at_once(sweep: TimeSweep, tmp_path: Path) -> None:
    wrong = replace(sweep, tps=(3, 8), load_ranks=4)
    with pytest.raises(ConfigError) as error:
        opened(wrong, tmp_path)
    assert len(error.value.problems) == 3
    assert "tp 3 does not divide the 4 attention heads" in str(error.value)
    assert list(tmp_path.iterdir()) == [], "nothing half-written"
