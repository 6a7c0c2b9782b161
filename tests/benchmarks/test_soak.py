"""A hundred steps of the long run: everything is looked at, nothing grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import NUM_KEPT, NUM_LOOKS, soak


@pytest.mark.long
@pytest.mark.ranks
def test_a_hundred_steps(tmp_path: Path) -> None:
    rows = list(soak(steps=2 * NUM_LOOKS, folder=tmp_path / "run"))
    assert [row["step"] for row in rows] == list(range(0, 2 * NUM_LOOKS, 2))
    assert max(row["checkpoints"] for row in rows) == NUM_KEPT
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert events.stat().st_size > 100 * 2 * NUM_LOOKS, "some curves a step"
