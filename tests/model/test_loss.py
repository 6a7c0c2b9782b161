"""The loss of a few tokens at a time is the loss of all, and nothing in a step waits for a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from lobra.layout.layout import Layout
from lobra.layout.world import one_replica
from lobra.model.adapter import AdapterSpec
from lobra.model.groups import ReplicaGroups
from lobra.model.head import VocabParallelHead
from lobra.model.launch import run_ranks
from lobra.model.pipeline import run_replica
from lobra.model.stage import build_stage
from tests.model.support import (
    SPECS,
    loss_and_gradient,
    loss_inputs,
    micro_batch,
    random_adapter,
    random_batches,
    save_family,
    tensors_of,
)

VOCAB, HIDDEN, TOKENS = 50, 16, 23


def plain(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient by torch's own cross-entropy, on what `loss_and_gradient` computes."""
    hidden, weight, targets, factors = loss_inputs(VOCAB, HIDDEN, TOKENS, dtype)
    hidden.requires_grad_(True)
    losses = functional.cross_entropy(
        functional.linear(hidden, weight).float(), targets, reduction="none"
    )
    (losses * factors).sum().backward()
    return losses.detach(), hidden.grad.float()


@pytest.mark.parametrize("chunk", [1, 4, TOKENS, 1000])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_any_number_of_tokens_at_once(chunk: int, dtype: torch.dtype, bar: float) -> None:
    losses, gradient = loss_and_gradient(VOCAB, HIDDEN, TOKENS, dtype, chunk)
    expected_losses, expected_gradient = plain(dtype)
    torch.testing.assert_close(losses, expected_losses, rtol=bar, atol=bar)
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert error < bar


@pytest.mark.ranks
def test_the_vocabulary_of_two_ranks_a_few_tokens_at_a_time() -> None:
    expected_losses, expected_gradient = plain(torch.float32)
    for losses, gradient in run_ranks(
        "tests.model.support:vocab_parallel_loss", 2,
        dict(vocab=VOCAB, hidden=HIDDEN, tokens=TOKENS, chunk=5),
    ):  # fmt: skip
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_no_target_at_all_is_a_sum_over_nothing() -> None:
    head = VocabParallelHead(torch.randn(VOCAB, HIDDEN), range(VOCAB), None, VOCAB)
    hidden = torch.randn(3, HIDDEN, requires_grad=True)
    losses = head.losses(hidden[:0], torch.empty(0, dtype=torch.int64))
    losses.sum().backward()
    assert losses.shape == (0,)
    assert torch.equal(hidden.grad, torch.zeros(3, HIDDEN))


def test_the_logits_of_a_whole_micro_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lobra.model.head.LOGITS_AT_ONCE", 4 * VOCAB)
    head = VocabParallelHead(torch.randn(VOCAB, HIDDEN), range(VOCAB), None, VOCAB)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    with _Recorder() as seen:
        head.losses(hidden, torch.zeros(TOKENS, dtype=torch.int64)).sum().backward()
    assert max(seen.sizes) < TOKENS * VOCAB, "all logits at once"


class _Recorder(TorchDispatchMode):
    """Notes which operations run and how large their results are."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.sizes: list[int] = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            self.sizes.append(result.numel())
        return result


def stage_of(folder: Path, specs: dict[int, AdapterSpec] | None = None):
    place = one_replica(Layout(1, 1)).place(0)
    groups = ReplicaGroups(place, None, (0,), None, (0,))
    stage = build_stage(folder, groups, specs or dict(enumerate(SPECS)))
    for task in range(len(SPECS)):
        stage.load(task, random_adapter(stage.shape, task))
    return stage


# What makes the host wait on a GPU: values read, and results whose size depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique"}


@pytest.mark.parametrize("packed", [True, False])
def test_a_micro_batch_never_waits_for_the_device(tmp_path: Path, packed: bool) -> None:
    specs = {task: replace(spec, dropout=0.1 * task) for task, spec in enumerate(SPECS)}
    stage = stage_of(save_family("mistral", tmp_path / "base", sliding_window=8), specs)
    batches = [micro_batch(*batch, noise_seed=7, packed=packed) for batch in random_batches(3)]
    with _Recorder() as seen:
        run_replica(stage, tensors_of(stage, batches, [0.5, 0.25]), 2)
    assert not seen.names & WAITS, seen.names & WAITS
    assert "mm" in seen.names or "addmm" in seen.names
    with _Recorder() as seen:  # the check itself: looking for targets would wait
        torch.ones(2).nonzero()
    assert "nonzero" in seen.names
