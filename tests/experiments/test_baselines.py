"""The baselines train what PEFT trains on one process: losses agree step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.baselines import (
    plain_cost_model,
    plan_from,
    random_dataset,
    run_baseline,
    run_ours,
    work_of,
)
from benchmarks.baselines_ranks import (
    METHODS,
    Work,
    _loss_sum,
    _model,
    _trained,
    fully_sharded,
    micro_batches,
    train,
)
from lobra.layout.shapes import read_shape
from lobra.model.launch import run_ranks
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.sampling import sample_indices
from lobra.trainer.run import PRELOAD

NUM_SEQUENCES, LONGEST = 12, 48


@pytest.fixture
def work(tmp_path: Path) -> Work:
    wanted = work_of(tmp_path, "tiny", "cpu", 3, LONGEST, NUM_SEQUENCES)
    return replace(wanted, rank=4, alpha=4, max_tokens=64, learning_rate=5e-3)


def alone(work: Work) -> list[float]:
    """Return the losses of PEFT on this process, one sequence at a time."""
    cpu = torch.device("cpu")
    model = _model(work)
    optimizer = torch.optim.AdamW(_trained(model), lr=work.learning_rate, weight_decay=0)
    data = TokenizedDataset.load(work.data_folder)
    losses = []
    for step in range(work.steps):
        chosen = sample_indices(len(data), work.batch_size, work.seed, step)
        targets = int(data.lengths[chosen].sum()) - len(chosen)
        total = 0.0
        for index in chosen:
            (batch,) = micro_batches(data, np.array([index]), 10**6, cpu)
            loss = _loss_sum(model(input_ids=batch.ids).logits, batch.labels) / targets
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.long
@pytest.mark.ranks
def test_baselines_and_ours_train_what_peft_trains(work: Work, tmp_path: Path) -> None:
    wanted = alone(work)
    assert max(wanted) - min(wanted) > 0.01  # adapters matter, so equal losses are equal updates
    rows = [
        # 4: two groups of two, data parallel
        run_baseline(method, work, 4 if method == "tensor parallel" else 2)
        for method in METHODS
    ]
    plan = plan_from("<2,1>x1 <1,1>x1", LONGEST)
    costs = plain_cost_model(read_shape(work.model_folder).num_layers, plan)
    rows.append(run_ours(work, plan, tmp_path / "ours", costs))
    for row in rows:
        assert row.losses == pytest.approx(wanted, rel=2e-6), row.method
        assert row.tokens == rows[0].tokens
        assert row.memory_mib > 0 and row.step_s > 0


@pytest.mark.long
@pytest.mark.ranks
def test_fsdp_shards_every_weight_and_keeps_adapters_apart(work: Work) -> None:
    """bf16 weights beside fp32 adapters too, as on GPUs."""
    measured = run_ranks(
        "tests.experiments.test_baselines:sharded_weights",
        2,
        {"work": replace(work, precision="bf16")},
        timeout_s=120,
        environment={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        preload=PRELOAD,
    )
    for weights, trained, losses in measured:
        assert weights == {True} and trained == {"torch.float32"}
        assert all(np.isfinite(losses))


def sharded_weights(work: Work) -> tuple[set[bool], set[str], tuple[float, ...]]:
    """Run on every rank: whether each weight is a shard, the adapters' types, the losses."""
    from torch.distributed.tensor import DTensor, Shard

    model = _model(work)
    fully_sharded(model, torch.device("cpu"))
    kinds = {
        isinstance(p, DTensor) and all(isinstance(place, Shard) for place in p.placements)
        for p in model.parameters()
    }
    trained = {str(p.dtype) for p in _trained(model)}
    return kinds, trained, train("FSDP2 + PEFT", work).losses


def test_micro_batches_hold_every_sequence_once_within_the_limit() -> None:
    data = random_dataset(40, 300, 64)
    chosen = np.arange(40)
    batches = micro_batches(data, chosen, 512, torch.device("cpu"))
    assert all(batch.ids.numel() <= 512 for batch in batches)
    tokens = sum(int((batch.labels != -100).sum()) for batch in batches)
    assert tokens == int((data.lengths - 1).sum())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "foo"], "'foo' is not <tp,pp>xN"),
        (["--plan", "<0,1>x4"], "of positive numbers"),
        (["--plan", "<1,1>x3"], "has 3 ranks, not --ranks 4"),
        (["--model", "/nope"], "/nope"),
        (["--time-profile", "/nope"], "/nope"),
        (["--steps", "1"], "--steps 1: want an integer of 2 or more"),
        (["--device", "cuda", "--ranks", "999"], "999 wanted"),
    ],
)
def test_mistakes_are_told_before_a_rank_is_started(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["baselines", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
    assert "|" not in captured.out, "nothing was measured"
