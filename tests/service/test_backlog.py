"""Which data share a pass: in order, as many as there is room for, and everybody's part."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lobra.service.backlog import AGE_LIMIT_S, Backlog, Job
from lobra.service.wire import Datum, LossRequest

kinds = st.sampled_from(["forward_backward", "forward", "optim_step"])
lengths = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def job(model: str, seq_id: int, kind: str, sizes: list[int], arrived_at: float = 0.0) -> Job:
    data = tuple(Datum(np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n)) for n in sizes)
    content = LossRequest(model, seq_id, data, kind == "forward")
    return Job(f"{model}{seq_id}", model[0], model, seq_id, kind, content, arrived_at)


@st.composite
def backlogs(draw: st.DrawFn) -> tuple[Backlog, list[Job]]:
    """Draw models of two tenants with their jobs, which arrive in any order."""
    backlog, jobs = Backlog(), []
    for model in draw(st.lists(st.sampled_from(["a1", "a2", "b1", "b2"]), unique=True)):
        backlog.open(model, model[0], 1)
        own = draw(st.lists(st.tuples(kinds, lengths), max_size=5))
        jobs += [job(model, seq, kind, sizes) for seq, (kind, sizes) in enumerate(own, 1)]
    for one in draw(st.permutations(jobs)):
        backlog.add(one)
    return backlog, jobs


def carry_out(backlog: Backlog, max_tokens: int) -> list[tuple[str, str, int]]:
    """Carry everything out; return (what, model, number) in the order it was done."""
    done = []
    while heads := backlog.heads():
        others = [head for head in heads if head.kind == "optim_step"]
        for head in others:
            backlog.done(head)
            done.append((head.kind, head.model_id, head.seq_id))
        if others:
            continue
        found = backlog.next_pass(max_tokens, now=0.0)
        assert found is not None
        assert found.data
        tokens = sum(len(datum.tokens) for _, datum in found.data)
        assert tokens <= max_tokens or len(found.data) == 1
        assert {one.kind for one, _ in found.data} == {
            "forward_backward" if found.backward else "forward"
        }
        for one, datum in found.data:
            assert one.data[len(one.logprobs)] is datum  # in order, none twice
            one.logprobs.append(np.zeros(len(datum.tokens)))
        for one in sorted({one for one, _ in found.data}, key=lambda one: one.seq_id):
            if one.is_over:
                backlog.done(one)
                done.append((one.kind, one.model_id, one.seq_id))
    return done


@given(backlogs(), st.integers(20, 200))
def test_everything_is_done_once_and_in_order(drawn: tuple[Backlog, list[Job]], room: int) -> None:
    backlog, jobs = drawn
    done = carry_out(backlog, room)
    assert Counter(done) == Counter((one.kind, one.model_id, one.seq_id) for one in jobs)
    for model in {one.model_id for one in jobs}:
        numbers = [seq for _, name, seq in done if name == model]
        assert numbers == sorted(numbers)
    assert all(one.is_over for one in jobs if one.kind != "optim_step")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(50, 200))
def test_tenants_with_enough_to_do_get_as_many_tokens(one: int, other: int, room: int) -> None:
    """However many data of whatever length, the difference is a datum's."""
    backlog = Backlog()
    for model, size in (("a1", one), ("b1", other)):
        backlog.open(model, model[0], 1)
        backlog.add(job(model, 1, "forward_backward", [size] * 500))
    served: Counter[str] = Counter()
    for _ in range(10):
        found = backlog.next_pass(room, now=0.0)
        assert found is not None
        for own, datum in found.data:
            served[own.tenant] += len(datum.tokens)
            own.logprobs.append(np.zeros(1))
        if any(not left for left in (500 - len(q.head.logprobs) for q in backlog.queues.values())):
            return
        assert abs(served["a"] - served["b"]) <= max(one, other)


def test_who_comes_back_has_no_more_claim_and_the_old_go_first() -> None:
    backlog = Backlog()
    for model in ("a1", "b1", "c1"):
        backlog.open(model, model[0], 1)
    backlog.add(job("a1", 1, "forward", [10] * 100))
    for _ in range(5):
        found = backlog.next_pass(50, now=0.0)
        assert found is not None
        for own, _ in found.data:
            own.logprobs.append(np.zeros(1))
    backlog.add(job("b1", 1, "forward", [10] * 100))
    found = backlog.next_pass(100, now=0.0)
    assert found is not None
    assert Counter(own.tenant for own, _ in found.data) == {"a": 5, "b": 5}
    backlog.add(job("c1", 1, "forward", [30], arrived_at=-2 * AGE_LIMIT_S))
    found = backlog.next_pass(30, now=-AGE_LIMIT_S / 2)
    assert found is not None
    assert [own.tenant for own, _ in found.data] == ["c"]
