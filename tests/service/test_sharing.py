"""Whoever has much to do holds nobody up who has little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lobra.service.passes import PassRunner
from tests.service.support import Running, deployment_of, running
from tests.service.test_requests import datum

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def small(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service whose passes hold 64 tokens."""
    state = tmp_path_factory.mktemp("sharing") / "state"
    with running(deployment_of(base, state, [(1, 1)], 16)) as found:
        yield found


def test_a_small_request_is_in_the_next_pass_but_one(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much another tenant has sent before."""
    plain, passes = PassRunner.run, []

    def run(self: PassRunner, work: object, slots: object) -> None:
        passes.append({job.tenant for job, _ in work.data})  # type: ignore[attr-defined]
        if len(passes) == 1:
            sent.append(light.losses(models[1], 1, [datum(4)])[1])
        plain(self, work, slots)  # type: ignore[arg-type]

    monkeypatch.setattr(PassRunner, "run", run)
    heavy, light = small.client("heavy"), small.client("light")
    models = [one.new_model(one.new_session(), 0, rank=2) for one in (heavy, light)]
    sent: list[dict[str, str]] = []
    future = heavy.losses(models[0], 1, [datum(16)] * 80)[1]
    heavy.result(future)
    light.result(sent[0])
    assert len(passes) >= 20
    assert [number for number, tenants in enumerate(passes) if "light" in tenants] == [1]


def test_many_updates_and_saves_of_one_hold_up_no_pass_of_another(
    small: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, other = small.client("busy", max_models=2), small.client("other")
    models = [one.new_model(one.new_session(), 0, rank=2) for one in (busy, busy, other)]
    plain = small.service.coordinator._carry_out_next
    monkeypatch.setattr(small.service.coordinator, "_carry_out_next", lambda: False)
    many = 200
    for number in range(1, many + 1):
        busy.asked("optim_step", model_id=models[0], seq_id=number, adam_params={})
        save = dict(path="a", overwrite=True)
        last = busy.asked("save_weights", model_id=models[1], seq_id=number, **save)
    future = other.losses(models[2], 1, [datum(4)])[1]
    monkeypatch.setattr(small.service.coordinator, "_carry_out_next", plain)
    other.losses(models[2], 2, [datum(4)])  # wakes the coordinator
    other.result(future)
    done = small.service.ledger.waiting("busy")
    assert min(done.values()) > many / 2, "most of them are still to be carried out"
    busy.result(last)
