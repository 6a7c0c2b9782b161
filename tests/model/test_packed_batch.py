"""The tensors of packed micro-batches hold what their sequences hold, token by token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.sequences import MicroBatch, Sequence
from lobra.model.dropout import TaskNoise, TokenNoise, feature_keys, token_keys
from lobra.model.packed_batch import packed_tensors

CPU = torch.device("cpu")


@st.composite
def packed(draw: st.DrawFn) -> MicroBatch:
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
            )
        )
    return MicroBatch(tuple(sequences))


@given(st.lists(packed(), max_size=3))
def test_every_token_is_where_it_belongs(micro_batches: list[MicroBatch]) -> None:
    found = packed_tensors(micro_batches, CPU, torch.float32)
    for micro_batch, tensors in zip(micro_batches, found, strict=True):
        tokens, positions, tasks, targets, offsets = [], [], [], [], [0]
        for sequence in micro_batch.sequences:
            for place in sequence.targets.tolist():
                target = (len(tokens) + place - 1, int(sequence.tokens[place]), sequence.task)
                targets.append(target)
            tokens += sequence.tokens.tolist()
            positions += range(len(sequence.tokens))
            tasks += [sequence.task] * len(sequence.tokens)
            offsets.append(len(tokens))
        padding = micro_batch.padded_tokens - len(tokens)
        if padding:
            tokens, positions = tokens + [0] * padding, [*positions, *range(padding)]
            tasks += tasks[-1:] * padding
            offsets.append(len(tokens))
        assert tensors.tokens_1T.tolist() == [tokens]
        assert tensors.positions_1T.tolist() == [positions]
        assert tensors.packing.offsets_N.tolist() == offsets
        assert tensors.packing.offsets_N.dtype == torch.int32
        assert tensors.packing.lengths == tuple(np.diff(offsets).tolist())
        columns = (tensors.targets.positions_T, tensors.targets.tokens_T, tensors.targets.tasks_T)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == targets
        assert [task for task, start, stop in tensors.segments for _ in range(start, stop)] == tasks
        numbers = [task for task, _, _ in tensors.segments]
        assert len(set(numbers)) == len(numbers)
        assert tensors.noise is None


@given(st.lists(packed(), min_size=1, max_size=3), st.integers(0, 2**40))
def test_noise_is_that_of_each_sequence(micro_batches: list[MicroBatch], step: int) -> None:
    noise = {task: TaskNoise(2**62 + task, step + task, 0.1 * task) for task in range(4)}
    features = feature_keys(1, "q_proj", 8)
    found = packed_tensors(micro_batches, CPU, torch.float64, noise)
    for micro_batch, tensors in zip(micro_batches, found, strict=True):
        assert tensors.noise is not None
        offsets = iter(tensors.packing.offsets_N.tolist())
        start = next(offsets)
        for sequence in micro_batch.sequences:
            task = noise[sequence.task]
            length = len(sequence.tokens)
            keys = torch.from_numpy(
                token_keys([task.seed], [task.step], [sequence.index], [length])
            )
            dropout = torch.full((length,), task.dropout, dtype=torch.float64)
            alone = TokenNoise.of_tokens(keys, dropout, torch.float64)
            stop = next(offsets)
            found_factors = tensors.noise.part(slice(start, stop)).factors(features, range(8))
            assert torch.equal(found_factors, alone.factors(features, range(8)))
            start = stop
