"""A rank that dies or stands still costs nothing but time: requests wait, others carry them out."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.service import ranks, server
from lobra.service.deployment import Deployment
from lobra.service.wire import Datum
from tests.service import test_equality
from tests.service.dying import DEADLY, DULL, MORTAL
from tests.service.peft_alone import Step
from tests.service.support import Client, deployment_of, running
from tests.service.test_equality import ADAM, Trainer, check
from tests.service.test_page import fetched

pytestmark = pytest.mark.ranks

HANG_TIMEOUT_S = 4.0


def steps_of(number: int) -> list[Step]:
    """Return steps of the shared tenants' kind, of which one is deadly and one dull."""
    generator = np.random.default_rng(number)

    def datum(length: int) -> Datum:
        tokens = generator.integers(3, test_equality.VOCAB, (2, length)).astype(np.int32)
        return Datum(*tokens, generator.normal(size=length).astype(np.float32).astype(np.float64))

    adam = {**ADAM, "learning_rate": 3e-3}
    lengths = (5, DEADLY, 7, DULL, 11)
    return [Step(((datum(9), datum(20)), (datum(length),)), adam) for length in lengths]


def strike(state: Path, number: int, client: Client) -> None:
    """Send a signal to a rank that rests; return when it is missed."""
    os.kill(int((state / f"pid{MORTAL}").read_text()), number)
    deadline = time.monotonic() + 60
    while health(client) == "ok":
        assert time.monotonic() < deadline


def test_ranks_that_are_lost_are_started_again(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One dies in a pass, one at rest, one sleeps in a pass, one is stopped at rest; the adapter
    is PEFT's all the same."""
    monkeypatch.setattr(ranks, "RANK_TARGET", "tests.service.dying:serve_mortal")
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(test_equality, "steps_of", steps_of)
    state = tmp_path / "state"
    layouts = [(1, 1), (1, 1)]
    options = {"precision": "fp64", "hang_timeout": HANG_TIMEOUT_S}
    with (
        caplog.at_level(logging.ERROR, "lobra.service.server"),
        running(deployment_of(base, state, layouts, 64, **options)) as found,
    ):
        client = found.client("tenant", is_operator=True)
        trainer = Trainer(client, 0)
        start = trainer.save("save_weights_for_sampler", "start")
        steps = steps_of(0)
        trainer.train(steps[:3])
        strike(state, signal.SIGKILL, client)
        page = fetched(client, "/")[1]
        assert "Requests wait until the ranks are there: rank 1 failed: the process was kil" in page
        trainer.train(steps[3:4])
        strike(state, signal.SIGSTOP, client)
        trainer.train(steps[4:])
        assert health(client) == "ok"
        check(found, trainer, start, trainer.save("save_weights_for_sampler", "end"), tmp_path)
        assert not found.crashed
    told = [record.getMessage().splitlines() for record in caplog.records]
    killed, still = "the process was killed by SIGKILL", "it has not moved for 4 s, "
    expected = [killed, killed, still, still]
    assert len(told) == len(expected)
    for (why, *_, what), cause in zip(told, expected, strict=True):
        assert why.startswith(f"rank 1 failed: {cause}")
        assert what.startswith("requests wait, the ranks are started again in ")


def test_others_may_be_on_a_smaller_plan(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A lost host's are not started again; the adapter is PEFT's all the same."""
    monkeypatch.setattr(ranks, "RANK_TARGET", "tests.service.dying:serve_mortal")
    monkeypatch.setattr(server, "FIRST_PAUSE_S", 0.1)
    monkeypatch.setattr(test_equality, "steps_of", steps_of)
    state = tmp_path / "state"
    whole = deployment_of(base, state, [(1, 1), (1, 1), (1, 1)], 64, precision="fp64")
    smaller = deployment_of(base, state, [(1, 1)], 64, precision="fp64")
    present = [whole]

    def start(*how: Any) -> None:
        ranks.on_this_machine(present[-1].run)(*how)

    def after_failure() -> Deployment:
        present.append(smaller)
        return smaller

    with running(whole, start=start, after_failure=after_failure) as found:
        client = found.client("tenant", is_operator=True)
        trainer = Trainer(client, 0)
        start_of = trainer.save("save_weights_for_sampler", "start")
        assert "Hosts are lost" not in fetched(client, "/")[1]
        trainer.train(steps_of(0))
        assert (state / "died").exists()
        page = fetched(client, "/")[1]
        assert "Hosts are lost: of &lt;1,1&gt;x1 &lt;1,1&gt;x1 &lt;1,1&gt;x1 there is" in page
        assert "lobra_ranks 1" in fetched(client, "/metrics")[1]
        check(found, trainer, start_of, trainer.save("save_weights_for_sampler", "end"), tmp_path)
        assert not found.crashed


def health(client: Client) -> str:
    return str(client.send("GET", "healthz")[1]["status"])
