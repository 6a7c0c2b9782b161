"""Hosts of a host file after a failure: waited for, left out, replaced by spare ones, back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lobra.common.errors import ConfigError
from lobra.trainer import run_hosts
from lobra.trainer.run_hosts import RunHosts
from tests.trainer.support import make_plan

AWAIT_S = 25.0
SLOTS = {"a": 2, "b": 2, "c": 2}
WHOLE, PART = make_plan([(1, 1)] * 6, 64), make_plan([(1, 1)] * 4, 64)


class Network:
    """Which hosts answer, by a clock that only goes while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.back_at_s: dict[str, float] = {}

    def answers(self, name: str) -> bool:
        return self.now_s >= self.back_at_s.get(name, 0.0)

    def sleep(self, pause_s: float) -> None:
        assert pause_s > 0 and self.now_s < 1e4, "waits for ever"
        self.now_s += pause_s


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    made = Network()
    monkeypatch.setattr(run_hosts, "answers", made.answers)
    monkeypatch.setattr(run_hosts, "is_this_host", lambda _name: False)
    monkeypatch.setattr(run_hosts.time, "sleep", made.sleep)
    monkeypatch.setattr(run_hosts.time, "monotonic", lambda: made.now_s)
    return made


@pytest.fixture
def hosts(network: Network) -> RunHosts:
    return RunHosts(Path("hosts"), SLOTS, AWAIT_S)


def never(_left: Mapping[str, int], _reason: str) -> str:
    raise AssertionError("no plan is wanted")


def planner(network: Network, asked: list) -> Callable[[Mapping[str, int], str], str]:
    """Return what notes when it is asked for a plan, for what and why."""

    def plan_anew(left: Mapping[str, int], reason: str) -> str:
        asked.append((network.now_s, dict(left), reason))
        return "another"

    return plan_anew


def test_a_host_that_is_back_in_time_is_waited_for(network: Network, hosts: RunHosts) -> None:
    network.back_at_s["b"] = AWAIT_S - 1.0
    assert hosts.after_failure(WHOLE, never) is None
    assert hosts.slots == SLOTS and network.now_s >= AWAIT_S - 1.0


@pytest.mark.parametrize("await_s", [0.0, AWAIT_S])
def test_the_others_go_on_on_another_plan(network: Network, await_s: float) -> None:
    hosts = RunHosts(Path("hosts"), SLOTS, await_s)
    network.back_at_s["b"] = 1e3
    asked: list = []
    assert hosts.after_failure(WHOLE, planner(network, asked)) == "another"
    assert asked == [(await_s, {"a": 2, "c": 2}, "host b (2 GPUs) is lost")]
    assert hosts.chosen(3) == {"a": 2, "c": 1}
    with pytest.raises(ConfigError, match="4 slots on 2 hosts, the plan needs 5"):
        hosts.chosen(5)
    network.now_s = 500.0  # a later failure: who is still lost is not waited for
    assert hosts.after_failure(PART, never) is None
    assert network.now_s == 500.0 and hosts.lost == {"b"}
    network.now_s = 1e3
    assert hosts.after_failure(PART, planner(network, asked)) == "another"
    assert asked[1:] == [(1e3, SLOTS, "host b (2 GPUs) is back")]
    assert hosts.slots == SLOTS


def test_spare_slots_take_the_ranks_of_a_lost_host(network: Network, hosts: RunHosts) -> None:
    network.back_at_s["b"] = 1e3
    assert hosts.after_failure(PART, never) is None
    assert network.now_s == AWAIT_S and hosts.chosen(4) == {"a": 2, "c": 2}


def test_spare_slots_that_cannot_hold_a_replica_do_not(network: Network) -> None:
    hosts = RunHosts(Path("hosts"), {"a": 1, "b": 2, "c": 1, "d": 1}, AWAIT_S)
    network.back_at_s["b"] = 1e3
    asked: list = []
    plan = make_plan([(2, 1), (1, 1)], 64)
    assert hosts.after_failure(plan, planner(network, asked)) is None
    hosts = RunHosts(Path("hosts"), {"a": 3, "b": 2, "c": 1, "d": 1}, 0.0)
    network.now_s = 0.0
    plan = make_plan([(2, 1), (2, 1), (1, 1)], 64)
    assert hosts.after_failure(plan, planner(network, asked)) == "another"
    assert asked == [(0.0, {"a": 3, "c": 1, "d": 1}, "host b (2 GPUs) is lost")]


def test_where_there_is_no_plan_the_host_is_waited_for(
    network: Network, hosts: RunHosts, caplog: pytest.LogCaptureFixture
) -> None:
    network.back_at_s["b"] = 1e3
    asked: list = []

    def refuse(left: Mapping[str, int], reason: str) -> str:
        planner(network, asked)(left, reason)
        raise ConfigError("no layout within 4 GPUs holds 512 tokens")

    assert hosts.after_failure(WHOLE, refuse) is None
    assert network.now_s >= 1e3 and hosts.slots == SLOTS
    assert [at_s for at_s, _, _ in asked] == [AWAIT_S], "once"
    assert caplog.messages == [
        "waiting for what does not answer by ssh: host b",
        "host b (2 GPUs) is lost; no plan for the others: no layout within 4 GPUs holds 512 tokens",
        "waiting for what does not answer by ssh: host b",
    ]


def test_the_first_host_is_waited_for_whatever(network: Network, hosts: RunHosts) -> None:
    """All that is kept is there."""
    network.back_at_s.update(a=1e3, c=1e4)
    asked: list = []
    assert hosts.after_failure(WHOLE, planner(network, asked)) == "another"
    assert [left for _, left, _ in asked] == [{"a": 2, "b": 2}]
    assert asked[0][0] >= 1e3


def test_this_machine_is_there(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is alone in its file may have no ssh."""
    monkeypatch.setattr(run_hosts, "is_this_host", lambda name: name == "a")
    network.back_at_s["a"] = 1e9
    assert RunHosts(Path("hosts"), {"a": 6}, AWAIT_S).after_failure(WHOLE, never) is None


def test_every_host_that_does_not_answer_before_the_first_start_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that ranks are to be on; spare ones may come later."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\n[[ $5 == localhost ]] && exit\necho "no $5 here" >&2\nexit 255\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = tmp_path / "hosts"
    file.write_text("localhost slots=1\nb.invalid slots=1\nc.invalid slots=1\nd.invalid slots=1\n")
    hosts = RunHosts.read(file, AWAIT_S)
    hosts.check_answers(1)
    with pytest.raises(ConfigError) as caught:
        hosts.check_answers(3)
    assert list(caught.value.problems) == [
        f"{file}: host {name} does not answer by ssh: no {name} here; `ssh {name} true` must work "
        f"without a password"
        for name in ("b.invalid", "c.invalid")
    ]


def test_this_machine_under_two_names_is_a_mistake(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 slots=1\nb.invalid slots=1\nlocalhost slots=1\n")
    with pytest.raises(ConfigError, match="hosts 127.0.0.1, localhost are one machine, this one"):
        RunHosts.read(file, AWAIT_S)
