"""What ranks do that torchrun has started again: they go on with their own run, and no other."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lobra.trainer.agent import agent_of, going_on
from lobra.trainer.request import TrainRequest
from tests.trainer.test_formats import FORMATS

AGENT = "process 7 of here, started at tick 9"


@pytest.fixture
def request_of_its_agent(tmp_path: Path) -> TrainRequest:
    """A request in whose folder there is a run of the same agent after two steps."""
    shutil.copytree(FORMATS / "run", tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "agent": AGENT}))
    return TrainRequest("base", "tasks.json", "plan.yaml", tmp_path / "run", agent=AGENT)


def test_a_process_is_an_agent_of_its_own_under_torchrun_only() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}
    assert agent_of({"RANK": "0"}, os.getpid()) is None
    own, other = (agent_of(torchrun, pid) for pid in (os.getpid(), os.getppid()))
    assert own == agent_of(torchrun, os.getpid()) and own != other


def test_its_own_run_goes_on(
    request_of_its_agent: TrainRequest, caplog: pytest.LogCaptureFixture
) -> None:
    request = replace(request_of_its_agent, resume=(1,), revive=("few",))
    for given in (request_of_its_agent, request):
        assert going_on(given) == replace(given, resume=(2,), revive=())
    assert caplog.messages == [
        "torchrun has started the ranks again: the run goes on from step 2",
        "torchrun has started the ranks again: the run goes on from step 2",
    ]


@pytest.mark.parametrize("agent", [None, "process 8 of here, started at tick 9"])
def test_another_s_is_left_as_it_is(request_of_its_agent: TrainRequest, agent: str | None) -> None:
    request = replace(request_of_its_agent, agent=agent)
    assert going_on(request) == request
    assert going_on(replace(request, output_dir=Path("none"))).resume is None


def test_without_a_checkpoint_it_begins_anew(request_of_its_agent: TrainRequest) -> None:
    shutil.rmtree(request_of_its_agent.output_dir / "checkpoints")
    assert going_on(request_of_its_agent) == request_of_its_agent
    assert not (request_of_its_agent.output_dir / "metrics.jsonl").exists()
