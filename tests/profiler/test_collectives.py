"""Collectives: fitted exactly where they are lines, read with every mistake named, measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.shapes import NAMED_SHAPES
from lobra.profiler.collective_time import open_collectives, sweep_collectives, wanted_rows
from lobra.profiler.collectives import fit_link, load_collectives
from lobra.profiler.cost_model import (
    TokenShares,
    fit_cost_model,
    load_cost_model,
    padded_work,
)
from lobra.profiler.csv_rows import append_row
from lobra.profiler.profiles import TimeProfile
from lobra.profiler.sidecar import write_meta

COLUMNS = ("kind", "ranks", "bytes", "time")


def profile() -> TimeProfile:
    s, b = (axis.reshape(-1) for axis in np.meshgrid([64, 128, 256, 512], [1, 2, 4]))
    return TimeProfile(np.ones_like(b), s, b, 1.0 + 0.01 * b * s)


def written(path: Path) -> Path:
    for size in (1_000, 100_000, 1_000_000):
        append_row(path, COLUMNS, ("transfer", 2, size, 0.1 + 1e-6 * size))
        append_row(path, COLUMNS, ("sync", 2, size, 0.2 + 3e-6 * size))
        append_row(path, COLUMNS, ("sync", 4, size, 0.6 + 4e-6 * size))
    write_meta(path, {"settings": {"bytes_per_token": 512}})
    return path


def test_a_line_is_found_again_and_nothing_is_negative() -> None:
    sizes = np.array([1e3, 1e5, 1e7])
    link = fit_link(sizes, 0.3 + 2e-6 * sizes)
    assert link.latency_ms == pytest.approx(0.3)
    assert link.ms_per_byte == pytest.approx(2e-6)
    falling = fit_link(sizes, np.array([3.0, 2.0, 1.0]))
    assert falling.latency_ms >= 0
    assert falling.ms_per_byte >= 0


def test_a_pipelined_micro_batch_pays_for_two_transfers(tmp_path: Path) -> None:
    links = load_collectives(written(tmp_path / "links.csv"))
    plain = fit_cost_model(profile(), 8)
    paying = fit_cost_model(profile(), 8, collectives=links)
    b, s = np.array([1, 2])[:, None], np.array([64, 100, 500])[None, :]
    work = padded_work(b, s)
    times = [model.micro_batch_time(Layout(1, 1), *work).total_ms for model in (plain, paying)]
    assert np.array_equal(*times)
    extra = paying.micro_batch_time(Layout(1, 2), *work).transfer_ms
    assert extra == pytest.approx(2 * (0.1 + 1e-6 * 512 * b * s))


def test_synchronisation_grows_with_ranks_and_is_free_where_not_measured(tmp_path: Path) -> None:
    links = load_collectives(written(tmp_path / "links.csv"))
    model = fit_cost_model(profile(), 8, collectives=links).for_training(TokenShares(), 1_000_000)
    times = [model.sync_time_ms(ranks) for ranks in (1, 2, 3, 4, 8, 16)]
    assert times[0] == 0
    assert times[1] == pytest.approx(0.2 + 3e-6 * 4e6)
    assert times == sorted(times)
    assert model.sync_time_ms(4, 0.5) < model.sync_time_ms(4), "half of the layers, half of it"
    assert fit_cost_model(profile(), 8).for_training(TokenShares(), 1_000_000).sync_time_ms(8) == 0
    assert fit_cost_model(profile(), 8, collectives=links).sync_time_ms(8) == 0, "no adapters"


def test_every_mistake_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "links.csv")
    with path.open("a", encoding="utf-8") as file:
        file.write("gossip,2,100,1.0\nsync,1,100,1.0\nsync,2,100\nsync,2,100,inf\n")
    write_meta(path, {})
    with pytest.raises(ConfigError) as error:
        load_collectives(path)
    assert len(error.value.problems) == 5


MEASURED = {"kind": "measured", "environment": {"hardware": {"name": "one"}}}


@pytest.mark.parametrize(
    ("times", "problem"),
    [
        ({}, None),
        ({"kind": "measured"}, None),
        (MEASURED, None),
        ({**MEASURED, "kind": "measured on a single device"}, None),
        ({**MEASURED, "environment": {}}, None),
        ({**MEASURED, "environment": {"hardware": {"name": "two"}}}, "measured on two, but"),
        ({"kind": "estimated", "environment": {}}, "time.csv is estimated, but"),
    ],
)
def test_collectives_are_of_what_the_times_are_of(
    tmp_path: Path, times: dict, problem: str | None
) -> None:
    links, path = written(tmp_path / "links_time.csv"), tmp_path / "time.csv"
    write_meta(links, {"settings": {"bytes_per_token": 512}, **MEASURED})
    for size in (64, 128, 256, 512):
        append_row(path, ("tp", "seq_len", "mbs", "time"), (1, size, 1, 1 + 0.01 * size))
    if times:
        write_meta(path, times)
    if problem is None:
        assert load_cost_model("tiny", path).collectives is not None
        return
    with pytest.raises(ConfigError, match=problem) as error:
        load_cost_model("tiny", path)
    assert "links_time.csv beside it is measured on one: remove" in str(error.value)


def test_so_are_embedding_and_head(tmp_path: Path) -> None:
    path, head = tmp_path / "time.csv", tmp_path / "head_time.csv"
    append_row(path, ("tp", "seq_len", "mbs", "time"), (1, 64, 1, 1.0))
    head.write_text("to be refused before it is read", encoding="utf-8")
    write_meta(path, {"kind": "estimated"})
    write_meta(head, MEASURED)
    with pytest.raises(ConfigError, match=r"head_time.csv beside it is measured on one: remove"):
        load_cost_model("tiny", path)


@pytest.mark.ranks
def test_two_real_ranks_and_a_continued_sweep(tmp_path: Path) -> None:
    path = tmp_path / "links.csv"

    def opened():
        return open_collectives(NAMED_SHAPES["tiny"], path, "fp32", "cpu", "never", {})

    sweep_collectives(opened(), (2,), "cpu")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + len(wanted_rows((2,)))
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:5])
    sweep_collectives(opened(), (2,), "cpu")
    again = path.read_bytes().splitlines(keepends=True)
    assert again[:-1] == lines[:-1], "nothing is measured twice"
    assert len(again) == len(lines)
    links = load_collectives(path)
    assert links.bytes_per_token == 4 * NAMED_SHAPES["tiny"].hidden_size
    assert float(links.transfer_ms(1000)) > 0
