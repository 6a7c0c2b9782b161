"""Joint equals alone on a GPU: the same proof as on CPU ranks, and against the same PEFT there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.support import save_family
from tests.trainer.alone import make_starts
from tests.trainer.test_equality import (
    BAR,
    Reference,
    final_tensors,
    relative_errors,
    train_jointly,
)


@pytest.mark.gpu
def test_joint_equals_alone_on_a_gpu(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    reference = Reference(base, make_starts(base, tmp_path / "starts"))
    run, _ = train_jointly(reference, [(1, 1)], tmp_path / "run", "fp64", "cuda")
    for number, alone in enumerate(reference.alone(torch.float64)):
        errors = relative_errors(final_tensors(run, number), alone["tensors"])
        assert max(errors.values()) < BAR, errors
