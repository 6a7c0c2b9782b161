"""What is drawn is what the data says is learned, and the tensors that it becomes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.sequences import MicroBatch, Sequence
from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import all_sequences, draw_sequences, micro_batch_tensors
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
    drawn = all_sequences(1, dataset(sequences))
    assert [(s.task, s.index) for s in drawn] == [(1, n) for n in range(len(sequences))]
    for sequence, row in zip(drawn, sequences, strict=True):
        assert sequence.targets.tolist() == [k for k, learned in enumerate(row) if learned and k]


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=8))
def test_tensors_are_those_that_padded_labels_stand_for(sequences: list[list[bool]]) -> None:
    data = {0: dataset(sequences), 2: dataset(sequences[:1])}
    drawn = [sequence for number, own in data.items() for sequence in all_sequences(number, own)]
    tokens = torch.zeros(len(drawn), 7, dtype=torch.int64)
    labels = torch.full((len(drawn), 7), -100)
    for row, sequence in enumerate(drawn):
        ids, learned = data[sequence.task].sequence(sequence.index)
        tokens[row, : len(ids)] = torch.from_numpy(ids)
        labels[row, : len(ids)] = torch.from_numpy(learned)
    weights = torch.ones(3)
    expected = micro_batch(tokens, labels, tuple(s.task for s in drawn), weights)
    found = micro_batch_tensors(MicroBatch(tuple(drawn), 7), weights, torch.device("cpu"))
    assert torch.equal(found.tokens_BS, expected.tokens_BS)
    assert found.segments == expected.segments
    for name in ("positions_T", "tokens_T", "tasks_T"):
        ours, theirs = getattr(found.targets, name), getattr(expected.targets, name)
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def noise_seed(sequences: list[Sequence]) -> int | None:
    batch = MicroBatch(tuple(sequences), 6)
    return micro_batch_tensors(batch, torch.ones(9), torch.device("cpu")).noise_seed


def test_noise_is_of_the_task_and_its_own_step() -> None:
    """Another number in the run changes nothing; another step, seed or company does."""
    task = TaskConfig("one", 2, 4.0, ("q_proj",), 3, dataset_name="random", context_length=64)
    data = dataset([[True] * 4] * 2)  # two sequences, three a step: one is drawn twice

    def drawn(number: int = 0, run_seed: int = 0, step: int = 0) -> list[Sequence]:
        return draw_sequences(number, task, data, run_seed, step)

    assert noise_seed(drawn(number=8)) == noise_seed(drawn())
    batches = [drawn(), drawn(step=1), drawn(run_seed=1)]
    parts = [part for batch in batches for part in (batch, batch[:1], batch[1:2], batch[2:])]
    assert len({noise_seed(part) for part in parts}) == len(parts)
