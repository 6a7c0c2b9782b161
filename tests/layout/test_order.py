"""What an order carries arrives as it was sent, and its work is that of its parts."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.order import AdamSettings, SlotOrder, StepOrder, Update
from lobra.layout.sequences import (
    PACKED_MULTIPLE,
    Clipping,
    Labels,
    MicroBatch,
    Rollout,
    Sequence,
    total_work,
)

TASKS = (0, 1, 7)
number = st.integers(0, 2**62)


@st.composite
def sequences(draw: st.DrawFn, labelled: bool = False) -> Sequence:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9))
    targets = draw(st.sets(st.integers(1, len(ids) - 1))) if len(ids) > 1 else set()
    return Sequence(
        draw(st.sampled_from(TASKS)),
        draw(number),
        np.array(ids, dtype=np.int32),
        np.array(sorted(targets), dtype=np.int32),
        draw(number),
        draw(labels(len(targets))) if labelled else None,
        draw(st.sampled_from([-1, 0, 1])),
        draw(st.integers(0, len(targets))),
        draw(st.none() | rollouts(len(targets))),
    )


@st.composite
def labels(draw: st.DrawFn, count: int) -> Labels:
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=count, max_size=count))
    weights = draw(st.lists(st.floats(), min_size=count, max_size=count))
    return Labels(np.array(tokens, dtype=np.int32), np.array(weights, dtype=np.float64))


@st.composite
def rollouts(draw: st.DrawFn, count: int) -> Rollout:
    values = draw(st.lists(st.floats(), min_size=2 * count, max_size=2 * count))
    logprobs, advantages = np.array(values, dtype=np.float64).reshape(2, count)
    return Rollout(logprobs, advantages, Clipping(draw(finite), draw(finite)))


@st.composite
def micro_batches(draw: st.DrawFn, labelled: bool = False) -> MicroBatch:
    rows = draw(st.lists(sequences(labelled), min_size=1, max_size=4))
    longest = max(len(row.tokens) for row in rows)
    padded_lengths = st.one_of(st.none(), st.integers(longest, longest + 16))
    return MicroBatch(tuple(rows), draw(padded_lengths))


tasks = st.lists(number, max_size=3).map(tuple)
finite = st.floats(allow_nan=False)
settings = st.builds(AdamSettings, *[finite] * 4)
updates = st.builds(Update, number, finite, finite, st.none() | settings)
adapters = st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2)
slot_orders = st.builds(
    SlotOrder,
    st.sampled_from(["install", "save", "remove"]),
    number,
    st.none() | adapters,
    st.text(max_size=9),
    st.booleans(),
    number,
)


@st.composite
def orders(draw: st.DrawFn) -> StepOrder:
    batches = micro_batches(draw(st.booleans()))
    replicas = draw(st.lists(st.lists(batches, max_size=3).map(tuple), max_size=3))
    return StepOrder(
        draw(st.integers(0, 2**40)),
        tuple(replicas),
        tuple(draw(st.lists(updates, max_size=3))),
        slots=tuple(draw(st.lists(slot_orders, max_size=2))),
        accumulate=draw(st.booleans()),
        keep=draw(tasks),
        export=draw(tasks),
        export_best=draw(tasks),
        save=draw(st.booleans()),
        stop=draw(st.booleans()),
        finished=draw(st.booleans()),
    )


@given(orders())
def test_what_is_sent_arrives(order: StepOrder) -> None:
    flat = order.encoded
    assert (flat.dtype, flat.ndim) == (np.int64, 1)
    arrived = StepOrder.decode(flat)
    assert arrived == order
    for sequence in arrived.sequences:
        assert (sequence.tokens.dtype, sequence.targets.dtype) == (np.int32, np.int32)
    np.testing.assert_array_equal(arrived.encoded, flat)


@given(orders())
def test_the_work_of_an_order_is_that_of_its_parts(order: StepOrder) -> None:
    by_batch = total_work(batch.work for replica in order.replicas for batch in replica)
    assert by_batch == total_work(order.work.values())
    assert by_batch.squares == math.fsum(len(s.tokens) ** 2 for s in order.sequences)
    assert list(order.work) == sorted({sequence.task for sequence in order.sequences})
    for task, work in order.work.items():
        own = [s for s in order.sequences if s.task == task]
        assert work.tokens == sum(len(s.tokens) for s in own)
        assert work.labels == sum(len(s.targets) for s in own)
    assert by_batch.tokens <= order.padded_tokens


@given(micro_batches())
def test_packing_pads_less_than_one_multiple(batch: MicroBatch) -> None:
    packed = MicroBatch(batch.sequences)
    assert packed.work == batch.work
    assert 0 <= packed.padded_tokens - packed.work.tokens < PACKED_MULTIPLE
    padding = packed.padded_tokens - packed.work.tokens
    assert packed.padded_tokens % PACKED_MULTIPLE == 0 or (len(packed.sequences), padding) == (1, 0)
