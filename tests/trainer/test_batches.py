"""What is drawn is what the data says is learned."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.tasks.config import TaskConfig
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import all_sequences, draw_sequences

TASK = TaskConfig("one", 2, 4.0, ("q_proj",), 3, dataset_name="random", context_length=64)


def dataset(rows: list[list[bool]]) -> TokenizedDataset:
    """Sequences whose tokens are learned where a row says so."""
    learned = np.array([value for row in rows for value in row], dtype=bool)
    tokens = np.arange(1, len(learned) + 1, dtype=np.int32)
    labels = np.where(learned, tokens, np.int32(-100)).astype(np.int32)
    return TokenizedDataset(tokens, labels, np.cumsum([0, *map(len, rows)]).astype(np.int64))


rows = st.lists(st.booleans(), max_size=6)


@given(st.lists(rows, max_size=8))
def test_targets_are_the_learned_tokens_but_never_the_first(sequences: list[list[bool]]) -> None:
    drawn = all_sequences(1, TASK, dataset(sequences))
    assert [(s.task, s.index) for s in drawn] == [(1, n) for n in range(len(sequences))]
    for sequence, row in zip(drawn, sequences, strict=True):
        assert sequence.targets.tolist() == [k for k, learned in enumerate(row) if learned and k]


def test_noise_is_of_the_task_and_its_own_step() -> None:
    """Another number in the run changes nothing; another step, seed or place in the batch does."""
    data = dataset([[True] * 4] * 2)  # two sequences, three a step: one is drawn twice

    def seeds(number: int = 0, run_seed: int = 0, step: int = 0) -> list[int]:
        return [one.noise_seed for one in draw_sequences(number, TASK, data, run_seed, step)]

    assert seeds(number=8) == seeds()
    every = seeds() + seeds(step=1) + seeds(run_seed=1)
    assert len(set(every)) == len(every)
