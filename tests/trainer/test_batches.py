"""What is drawn is what the data says is learned, and the tensors that it becomes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.sequences import MicroBatch
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import all_sequences, micro_batch_tensors
from tests.model.support import micro_batch


def dataset(rows: list[list[bool]]) -> TokenizedDataset:
    """Sequences whose tokens are learned where a row says so."""
    learned = np.array([value for row in rows for value in row], dtype=bool)
    tokens = np.arange(1, len(learned) + 1, dtype=np.int32)
    labels = np.where(learned, tokens, np.int32(-100)).astype(np.int32)
    return TokenizedDataset(tokens, labels, np.cumsum([0, *map(len, rows)]).astype(np.int64))


rows = st.lists(st.booleans(), max_size=6)


@given(st.lists(rows, max_size=8))
def test_targets_are_the_learned_tokens_but_never_the_first(sequences: list[list[bool]]) -> None:
    drawn = all_sequences([None, dataset(sequences)])
    assert [(s.task, s.index) for s in drawn] == [(1, n) for n in range(len(sequences))]
    for sequence, row in zip(drawn, sequences, strict=True):
        assert sequence.targets.tolist() == [k for k, learned in enumerate(row) if learned and k]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8))
def test_tensors_are_those_that_padded_labels_stand_for(sequences: list[list[bool]]) -> None:
    data = [dataset(sequences), None, dataset(sequences[:1])]
    drawn = all_sequences(data)
    tokens = torch.zeros(len(drawn), 7, dtype=torch.int64)
    labels = torch.full((len(drawn), 7), -100)
    for row, sequence in enumerate(drawn):
        own = data[sequence.task]
        assert own is not None
        ids, learned = own.sequence(sequence.index)
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        labels[row, : len(ids)] = torch.from_numpy(learned)
    weights = torch.ones(3)
    expected = micro_batch(tokens, labels, tuple(s.task for s in drawn), weights)
    found = micro_batch_tensors(MicroBatch(tuple(drawn), 7), weights, torch.device("cpu"), 0)
    assert torch.equal(found.tokens_BS, expected.tokens_BS)
    assert found.segments == expected.segments
    for name in ("positions_T", "tokens_T", "tasks_T"):
        ours, theirs = getattr(found.targets, name), getattr(expected.targets, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_the_noise_depends_on_the_sequences_and_the_seed() -> None:
    drawn = all_sequences([dataset([[True] * 4] * 3)])
    weights, cpu = torch.ones(1), torch.device("cpu")
    seeds = {
        micro_batch_tensors(MicroBatch(tuple(part), 4), weights, cpu, seed).noise_seed
        for seed in (1, 2)
        for part in (drawn, drawn[:2], drawn[1:])
    }
    assert len(seeds) == 6
