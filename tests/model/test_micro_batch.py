"""The tensors of micro-batches hold what their sequences hold, token by token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.sequences import PACKED_MULTIPLE, MicroBatch, Sequence
from lobra.model.dropout import TokenNoise, feature_keys, token_keys
from lobra.model.micro_batch import MicroBatchTensors, micro_batch_tensors

CPU = torch.device("cpu")
WEIGHTS = np.array([0.5, 1 / 3, 0.0, 2.0])


@st.composite
def micro_batches(draw: st.DrawFn) -> MicroBatch:
    sequences = []
    for task in sorted(draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))):
        tokens = draw(st.lists(st.integers(1, 999), min_size=1, max_size=20))
        targets = draw(st.sets(st.integers(1, len(tokens) - 1))) if len(tokens) > 1 else set()
        sequences.append(
            Sequence(
                task,
                draw(st.integers(0, 10**6)),
                np.array(tokens, dtype=np.int32),
                np.array(sorted(targets), dtype=np.int32),
                draw(st.integers(0, 2**56 - 1)),
            )
        )
    longest = max(len(sequence.tokens) for sequence in sequences)
    length = draw(st.one_of(st.none(), st.integers(longest, longest + 9)))
    return MicroBatch(tuple(sequences), length)


@given(st.lists(micro_batches(), max_size=3))
def test_every_token_is_where_it_belongs(batches: list[MicroBatch]) -> None:
    found = micro_batch_tensors(batches, WEIGHTS, CPU, torch.float32)
    for batch, tensors in zip(batches, found, strict=True):
        check(batch, tensors)


def check(batch: MicroBatch, tensors: MicroBatchTensors) -> None:
    tokens, positions, tasks, targets, lengths = [], [], [], [], []
    for sequence in batch.sequences:
        length = len(sequence.tokens)
        row = batch.padded_length or length
        for place in sequence.targets.tolist():
            target = (len(tokens) + place - 1, int(sequence.tokens[place]), sequence.task)
            targets.append(target)
        tokens += sequence.tokens.tolist() + [0] * (row - length)
        positions += range(row)
        tasks += [sequence.task] * row
        lengths.append(row)
    rest = batch.padded_tokens - len(tokens)
    if rest:
        assert batch.padded_length is None and rest < PACKED_MULTIPLE and len(lengths) > 1
        tokens, positions = tokens + [0] * rest, [*positions, *range(rest)]
        tasks += tasks[-1:] * rest
        lengths.append(rest)
    num_rows = 1 if batch.padded_length is None else len(batch.sequences)
    assert tensors.tokens_BS.shape[0] == num_rows
    assert tensors.tokens_BS.flatten().tolist() == tokens
    assert tensors.positions_1S.expand(num_rows, -1).flatten().tolist() == positions
    if batch.padded_length is None:
        assert tensors.packing is not None
        assert tensors.packing.offsets_N.tolist() == [0, *np.cumsum(lengths)]
        assert tensors.packing.offsets_N.dtype == torch.int32
        assert tensors.packing.lengths == tuple(lengths)
    else:
        assert tensors.packing is None
    columns = (tensors.targets.positions_P, tensors.targets.tokens_P, tensors.targets.tasks_P)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == targets
    assert {column.dtype for column in columns} == {torch.int64}
    segments = tensors.segments
    assert [one.number for one in segments for _ in range(one.start, one.stop)] == tasks
    assert len({one.number for one in segments}) == len(segments)
    assert tensors.task_weights.tolist() == WEIGHTS.astype(np.float32).tolist()
    assert tensors.noise is None


@given(st.lists(micro_batches(), min_size=1, max_size=3))
def test_noise_is_that_of_each_sequence(batches: list[MicroBatch]) -> None:
    dropouts = {task: 0.1 * task for task in range(4)}
    features = feature_keys(1, "q_proj", 8)
    found = micro_batch_tensors(batches, WEIGHTS, CPU, torch.float64, dropouts)
    for batch, tensors in zip(batches, found, strict=True):
        start = 0
        for sequence in batch.sequences:
            length = len(sequence.tokens)
            keys = torch.from_numpy(token_keys([sequence.noise_seed], [length]))
            dropout = torch.full((length,), dropouts[sequence.task], dtype=torch.float64)
            alone = TokenNoise.of_tokens(keys, dropout, torch.float64)
            assert tensors.noise is not None
            found_factors = tensors.noise.part(slice(start, start + length))
            expected = alone.factors(features, range(8))
            assert torch.equal(found_factors.factors(features, range(8)), expected)
            start += batch.padded_length or length


def test_without_dropout_nothing_is_drawn() -> None:
    ids = np.arange(3, dtype=np.int32)
    batch = MicroBatch((Sequence(2, 0, ids, ids[1:], 5),))
    for dropouts in (None, {}, {2: 0.0}):
        (tensors,) = micro_batch_tensors([batch], WEIGHTS, CPU, torch.float64, dropouts)
        assert tensors.noise is None
