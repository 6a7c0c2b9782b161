"""LongRoPE goes by each sequence's own length, whatever lies beside it in a micro-batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lobra.layout.layout import Layout
from lobra.layout.sequences import MicroBatch, Sequence
from lobra.layout.world import one_replica
from lobra.model.groups import ReplicaGroups
from lobra.model.stage import build_stage
from tests.model.support import save_family, tensors_of

LENGTHS = (20, 5, 16, 17)  # from 17 on a sequence is long


@pytest.mark.parametrize(("family", "packed"), [("llama", True), ("llama", False), ("phi3", True)])
def test_each_sequence_is_as_alone(family: str, packed: bool, tmp_path: Path) -> None:
    rope = dict(rope_type="longrope", rope_theta=10000.0, original_max_position_embeddings=16)
    turned, pairs = (0.5, 2) if family == "phi3" else (1.0, 8)  # of a head
    factors = dict(short_factor=[1.2] * pairs, long_factor=[3.0] * pairs)
    base = save_family(
        family, tmp_path / "base", num_hidden_layers=2, original_max_position_embeddings=16,
        rope_parameters={**rope, **factors, "partial_rotary_factor": turned, "factor": 8.0},
    )  # fmt: skip
    groups = ReplicaGroups(one_replica(Layout(1, 1)).place(0), None, (0,), None, (0,))
    stage = build_stage(base, groups, {})
    rows = [torch.randint(3, 256, (length,)) for length in LENGTHS]
    sequences = tuple(
        Sequence(0, place, row.numpy().astype(np.int32), np.array([1], np.int32), 0)
        for place, row in enumerate(rows)
    )
    (batch,) = tensors_of(stage, [MicroBatch(sequences, None if packed else 24)], [1.0])
    logits = stage.logits(batch)
    starts = np.cumsum([0, *LENGTHS]) if packed else [0] * len(rows)
    model = AutoModelForCausalLM.from_pretrained(base)
    for place, row in enumerate(rows):
        with torch.no_grad():
            expected = model(row[None]).logits[0]
        found = logits[0 if packed else place, starts[place] : starts[place] + len(row)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
