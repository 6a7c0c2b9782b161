"""Embedding and head: dearer with more labels, in proportion; old files without the base load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.profiler.cost_model import (
    FORWARD_SHARE,
    LOGITS_SHARE,
    TokenShares,
    fit_cost_model,
    load_cost_model,
    padded_work,
)
from lobra.profiler.head import HEAD_COLUMNS, HeadProfile, fit_heads, load_head_profile
from lobra.profiler.layer_time_rank import row_mixtures
from lobra.profiler.profiles import TimeProfile
from lobra.profiler.sidecar import write_meta

LENGTHS, SIZES = (64, 128, 256, 512), (1, 2, 4)


def base_ms(b: float, s: float) -> float:
    return 0.2 + 0.001 * b * s


def labels_ms(b: float, s: float, share: float) -> float:
    return 0.02 * b * s * share


def written(path: Path, share: float = 0.25) -> Path:
    lines = [",".join(HEAD_COLUMNS)]
    for s in LENGTHS:
        for b in SIZES:
            time_ms = base_ms(b, s) + labels_ms(b, s, share)
            lines.append(f"1,{s},{b},{base_ms(b, s)},{time_ms}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_meta(path, {"settings": {"label_share": share}})
    return path


def test_labels_cost_in_proportion(tmp_path: Path) -> None:
    fit = fit_heads(load_head_profile(written(tmp_path / "head.csv")))[1]
    b, s = np.array([1, 3, 4])[:, None], np.array([64, 300, 512])[None, :]
    for share in (0.05, 0.25, 1.0):
        wanted = base_ms(b, s) + labels_ms(b, s, share)
        assert fit.time_ms(b, s, share) == pytest.approx(wanted, rel=1e-3)
    assert np.array_equal(fit.time_ms(b, s), fit.time_ms(b, s, 0.25)), "as profiled by default"


def test_a_micro_batch_knows_what_is_trained(tmp_path: Path) -> None:
    rows = np.array([(1, s, b) for s in LENGTHS for b in SIZES])
    layers = TimeProfile(*rows.T, 1.0 + 0.01 * rows[:, 1] * rows[:, 2])
    head = load_head_profile(written(tmp_path / "head.csv"))
    model = fit_cost_model(layers, 4, head_profile=head)
    few, many = (model.for_training(TokenShares(share), 0) for share in (0.1, 0.9))
    work = padded_work(2, 256)
    few_ms, many_ms = (one.micro_batch_time(Layout(1, 1), *work).head_ms for one in (few, many))
    assert float(many_ms - few_ms) == pytest.approx(labels_ms(2, 256, 0.8), rel=1e-3)
    counted = few.micro_batch_time(Layout(1, 1), *work, labels=0.9 * 2 * 256)
    assert float(counted.head_ms) == pytest.approx(float(many_ms))


def test_passes_without_gradient_take_a_share_of_a_whole_one(tmp_path: Path) -> None:
    rows = np.array([(1, s, b) for s in LENGTHS for b in SIZES])
    layers = TimeProfile(*rows.T, 0.01 * rows[:, 1] * rows[:, 2])
    model = fit_cost_model(layers, 4, head_profile=load_head_profile(written(tmp_path / "h.csv")))
    models = (model.for_training(TokenShares(0.5, *again), 0) for again in ((0, 0), (1, 2)))
    plain, more = (one.micro_batch_time(Layout(1, 1), *padded_work(2, 256)) for one in models)
    assert float(more.layers_ms / plain.layers_ms) == pytest.approx(1 + FORWARD_SHARE["keep"])
    added_ms = 2 * LOGITS_SHARE * labels_ms(2, 256, 0.5)
    assert float(more.head_ms - plain.head_ms) == pytest.approx(added_ms, rel=1e-3)


def test_a_file_without_the_base_is_scaled_whole() -> None:
    rows = np.array([(1, s, b) for s in LENGTHS for b in SIZES])
    time_ms = labels_ms(rows[:, 1], rows[:, 2], 0.5)
    fit = fit_heads(HeadProfile(TimeProfile(*rows.T, time_ms)))[1]
    assert float(fit.time_ms(2, 256, 0.1)) == pytest.approx(labels_ms(2, 256, 0.1), rel=1e-3)


def test_mistakes_are_named(tmp_path: Path) -> None:
    path = written(tmp_path / "head.csv")
    path.write_text(path.read_text().replace("1,64,1,0.264", "1,64,1,-1"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 2: time_without_labels: -1.0 ms"):
        load_head_profile(path)
    with pytest.raises(ConfigError, match="label_share"):
        load_head_profile(written(tmp_path / "other.csv", share=1.5))


def test_profiles_beside_an_output_of_ones_own_are_found(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = [f"1,{s},{b},{1 + 0.01 * b * s}" for s in LENGTHS for b in SIZES]
    path.write_text("\n".join(["tp,seq_len,mbs,time", *rows]) + "\n", encoding="utf-8")
    assert not load_cost_model("tiny", path).head
    written(tmp_path / "head_mine.csv")
    assert set(load_cost_model("tiny", path).head) == {1}


@pytest.mark.parametrize("num_rows", [1, 2, 5, 32])
def test_mixtures_hold_every_task_as_often_as_it_is_drawn(num_rows: int) -> None:
    weights = (1, 2, 1)
    mixtures = row_mixtures(num_rows, weights, 4)
    assert mixtures == row_mixtures(num_rows, weights, 4)
    assert all(list(rows) == sorted(rows) and len(rows) == num_rows for rows in mixtures)
    counts = np.bincount([task for rows in mixtures for task in rows], minlength=3)
    assert np.array_equal(counts, np.array(weights) * num_rows)
