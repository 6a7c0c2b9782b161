"""What a global batch counts, and the tensors it becomes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import count_targets, micro_batch_tensors, target_tokens, whole_batch


def dataset(rows: list[list[bool]]) -> TokenizedDataset:
    """Sequences whose tokens are learned where a row says so; empty ones too."""
    learned = np.array([value for row in rows for value in row], dtype=bool)
    tokens = np.arange(1, len(learned) + 1, dtype=np.int32)
    labels = np.where(learned, tokens, np.int32(-100)).astype(np.int32)
    return TokenizedDataset(tokens, labels, np.cumsum([0, *map(len, rows)]).astype(np.int64))


rows = st.lists(st.lists(st.booleans(), max_size=6), max_size=8)


@given(rows)
def test_targets_of_every_sequence(sequences: list[list[bool]]) -> None:
    counted = count_targets(dataset(sequences))
    assert counted.tolist() == [sum(row[1:]) for row in sequences]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8))
def test_the_targets_of_a_batch_are_those_of_its_micro_batches(sequences: list) -> None:
    data = [dataset(sequences), None, dataset(sequences[:1])]
    batch = whole_batch(data)
    counts = target_tokens(batch, [None if own is None else count_targets(own) for own in data])
    found = np.zeros(3, dtype=np.int64)
    for part in np.array_split(np.arange(len(batch)), 2):
        tensors = micro_batch_tensors(
            batch, part, 6, data, torch.ones(3), torch.device("cpu"), seed=0
        )
        targets = tensors.targets
        assert targets is not None
        found += np.bincount(targets.tasks_T.numpy(), minlength=3)
        # The token after each position is the one to predict.
        following = tensors.tokens_BS.flatten()[targets.positions_T + 1]
        assert torch.equal(following, targets.tokens_T)
    assert counts.tolist() == found.tolist()
