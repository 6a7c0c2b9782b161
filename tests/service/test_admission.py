"""What memory does not hold is refused or waits; nobody is the worse for it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import resolve_shape
from lobra.profiler.capacity import Parts
from lobra.profiler.sidecar import write_meta
from lobra.service import seats
from lobra.service.admission import Admission, GroupMemory, admission_of
from lobra.service.deployment import prepare_deployment
from lobra.service.request import ServeRequest
from lobra.service.seats import Seats
from lobra.service.wire import Datum
from tests.service.support import deployment_of, running
from tests.service.test_requests import datum, refused

SHAPE = resolve_shape("7B")
EVERY = tuple(SHAPE.linear_sizes())
GIB = 1 << 30
ADAPTERS = st.lists(
    st.tuples(st.integers(1, 128), st.sampled_from([EVERY, EVERY[:4], EVERY[4:]])), max_size=5
)
PARTS = Parts(
    weight_bytes=13.0 * GIB,
    elements=float(SHAPE.adapter_elements(16, EVERY)),
    bytes_per_element=20.0,
    exchange_bytes_per_element=8.0,
    tokens=8192,
    activation_bytes=20.0 * GIB,
    bytes_per_token=2.0e6,
)


def measured(max_tokens: int, budget_bytes: int, is_joint: bool = False) -> Admission:
    group = ReplicaGroup(Layout(1, 1), 1, max_tokens)
    memory = GroupMemory(group, PARTS, ((16, EVERY),), ranks=16)
    return Admission(SHAPE, (memory,), budget_bytes, "bf16", is_joint)


@given(st.integers(1, 40), st.integers(1, 80), st.integers(1, 40))
def test_as_many_fit_as_planning_says(steps: int, budget_gib: int, count: int) -> None:
    """The planner's capacity beside so many adapters is at least the plan's micro-batch, or not."""
    admission = measured(256 * steps, budget_gib * GIB)
    planned = PARTS.max_tokens(budget_gib * GIB, count, 1 << 20)
    assert admission.holds([(16, EVERY)] * count) == (planned >= 256 * steps)


@given(ADAPTERS, ADAPTERS, st.booleans())
def test_more_adapters_take_more(some: Any, others: Any, is_joint: bool) -> None:
    admission = measured(4096, GIB, is_joint)
    (group,) = admission.groups
    less, more = (admission.needed_bytes(group, own) for own in (some, some + others))
    assert less <= more


def test_parts_of_a_profile_are_taken_and_estimates_else(tmp_path: Path) -> None:
    path = tmp_path / "profile.csv"
    path.write_text("tp,pp,sp,max_tokens\n1,1,1,8192\n")
    rows = {"1,1,1": {"parts": PARTS.as_json()}}
    settings = {"adapters": [[16, list(EVERY)]], "precision": "bf16"}
    write_meta(path, {"rows": rows, "settings": settings})
    assert json.loads(path.with_suffix(".meta.json").read_text())["rows"] == rows
    plan = Plan((ReplicaGroup(Layout(1, 1), 1, 8192), ReplicaGroup(Layout(2, 1), 1, 8192)))
    found = admission_of(SHAPE, plan, "bf16", "cuda", GIB, path).groups
    assert found[0].parts == PARTS
    assert found[1].parts.weight_bytes == pytest.approx(13.0 * GIB / 2, rel=0.1)
    other = admission_of(SHAPE, plan, "fp32", "cuda", GIB, path).groups
    assert other[0].parts != PARTS


def test_a_plan_that_leaves_no_room_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ServeRequest(str(base), device="cpu", memory_budget="1MB", state_dir=tmp_path)
    with pytest.raises(ValueError, match=r"would take .* beside micro-batches of 512 tokens"):
        prepare_deployment(request)
    with pytest.raises(ValueError, match="memory budget 'much'"):
        prepare_deployment(replace(request, memory_budget="much"))


@pytest.mark.ranks
def test_what_memory_does_not_hold_at_once_takes_turns(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two models fit one at a time: both are trained. One that does not fit alone is refused."""
    monkeypatch.setattr(seats, "IDLE_S", 0.0)
    deployment = deployment_of(base, tmp_path / "state", [(1, 1)], 64)
    every = tuple(deployment.shape.linear_sizes())
    needed = [
        max(
            deployment.admission.needed_bytes(group, adapters)
            for group in deployment.admission.groups
        )
        for adapters in ([(16, every)], [(16, every)] * 2)
    ]
    admission = replace(deployment.admission, budget_bytes=int(np.mean(needed)))
    held: list[bool] = []
    plain = Seats._seat

    def seat(self: Seats, *rest: Any) -> None:
        plain(self, *rest)
        held.append(admission.holds([own.adapter for own in self.taken.values()]))

    monkeypatch.setattr(Seats, "_seat", seat)
    with running(replace(deployment, admission=admission)) as found:
        clients = [found.client(name) for name in ("one", "other")]

        def train(client: Any) -> list[Any]:
            model = client.new_model(client.new_session(), 0, rank=16)
            results = []
            for step in range(3):
                loss = client.losses(model, 2 * step + 1, [datum(20)])[1]
                fields = dict(model_id=model, seq_id=2 * step + 2)
                update = client.asked("optim_step", adam_params={}, **fields)
                results += [client.result(loss), client.result(update)]
            return results

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(train, clients))
        assert all(update["metrics"]["grad_norm"] > 0 for own in results for update in own[1::2])
        assert len(held) > 1 and all(held)
        make = dict(session_id=clients[0].new_session(), model_seq_id=0, base_model="base")
        answer = clients[0].post("create_model", **make, lora_config=dict(rank=128))
        refused(answer, 400, "rank 128", "would take", "ask for a smaller one")


@pytest.mark.ranks
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_long_queue_takes_no_more_memory_than_a_full_pass(base: Path, tmp_path: Path) -> None:
    """193 requests of 816,000 tokens, one datum of which has 35,000."""
    most = 4096
    deployment = deployment_of(base, tmp_path / "state", [(1, 1)], most)
    generator = np.random.default_rng(0)
    lengths = np.minimum(generator.lognormal(6.5, 1.2, 5000).astype(int) + 1, most)
    ends = np.searchsorted(np.cumsum(lengths), np.linspace(0, 816_000, 194))
    with running(deployment) as found:
        clients = [found.client(f"tenant{number}") for number in range(4)]
        models = [client.new_model(client.new_session(), 0, rank=8) for client in clients]
        full = [Datum(*[np.full(most, 5, np.int32)] * 2, np.ones(most))]
        for client, model in zip(clients, models, strict=True):
            client.result(client.losses(model, 1, full)[1])
        tally = found.service.coordinator.tally
        alone = max(record.memory_bytes[0] for record in tally.view().recent)
        refused(clients[0].losses(models[0], 2, [datum(35_000)]), 400, "35000 tokens", "4096")
        futures = []
        for number in range(193):
            data = [datum(length) for length in lengths[ends[number] : ends[number + 1]]]
            place = number % 4
            client, model = clients[place], models[place]
            seq_id = 2 + number // 4 + (place == 0)  # the refused request has had its number
            status, future = client.losses(model, seq_id, data or [datum()])
            assert status == 200, future
            futures.append((client, future))
        for client, future in futures:
            assert isinstance(client.result(future), bytes)
        view = tally.view()
        assert sum(view.tokens.values()) > 700_000
        assert max(record.memory_bytes[0] for record in view.recent) < 1.25 * alone
