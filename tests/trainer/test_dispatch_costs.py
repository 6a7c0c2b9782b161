"""What training predicts and balances with, for plans whose layers are computed again."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.profiler.cost_model import padded_work
from lobra.trainer.dispatch_costs import dispatch_costs

SHAPES = [(s, b) for s in (64, 256, 1024) for b in (1, 4)]
PLAN = Plan((ReplicaGroup(Layout(1, 1), 2, 1024), ReplicaGroup(Layout(2, 1), 1, 4096)))

WORK = padded_work(2, 512)


def request(path: Path, **factors: float) -> SimpleNamespace:
    """A request for training with a profile of tp 1 and 2: ms per token by memory policy."""
    lines = [
        f"{tp},{s},{b},{1.0 + factor * b * s},{memory}"
        for memory, factor in factors.items()
        for tp in (1, 2)
        for s, b in SHAPES
    ]
    path.write_text("\n".join(["tp,seq_len,mbs,time,memory", *lines]) + "\n")
    return SimpleNamespace(model="tiny", time_profile=path, cost_model="fitted")


def test_a_plan_made_full_is_predicted_with_the_times_of_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `--memory full` does to a plan of layouts that keep all."""
    costs = dispatch_costs(request(tmp_path / "t.csv", keep=0.01, full=0.014), PLAN)  # type: ignore[arg-type]
    kept, again = (
        float(costs.micro_batch_time(group.layout, *WORK).layers_ms)
        for group in (PLAN.groups[0], PLAN.with_memory("full").groups[0])
    )
    assert again > 1.3 * kept
    assert not caplog.records


def test_without_them_it_is_said_that_steps_take_longer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only_kept = request(tmp_path / "t.csv", keep=0.01)
    with caplog.at_level(logging.WARNING):
        costs = dispatch_costs(only_kept, PLAN.with_memory("full"))  # type: ignore[arg-type]
    assert "no times of tp 1,2 with memory full" in caplog.text
    assert "lobra profile time --tp 1,2 --memory full" in caplog.text
    full, kept = (Layout(1, 1, memory=memory) for memory in ("full", "keep"))
    assert len({float(costs.micro_batch_time(own, *WORK).total_ms) for own in (full, kept)}) == 1
    with pytest.raises(ConfigError, match="no rows for tp 4 with memory full"):
        dispatch_costs(only_kept, Plan((ReplicaGroup(Layout(4, 1, memory="full"), 1, 512),)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no rows for tp 1; it has tp 1, 2 full"):
        dispatch_costs(request(tmp_path / "f.csv", full=0.01), PLAN)  # type: ignore[arg-type]
