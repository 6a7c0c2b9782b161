"""Whether micro-batches are packed or bucketed: what the user, the environment and the plan say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, make_plan
from lobra.trainer.batching import chosen_batching
from lobra.trainer.prepare import prepare
from lobra.trainer.request import TrainRequest
from tests.trainer.command import refused, train


@pytest.mark.parametrize(
    ("given", "planned", "expected"),
    [
        ({}, None, "packed"),
        ({}, "bucketed", "bucketed"),
        ({"batching": "packed"}, "bucketed", "packed"),
        ({"batching": "bucketed"}, "packed", "bucketed"),
        ({"dispatch": "group"}, None, "bucketed"),
        ({"dp_bucket": "on"}, "packed", "bucketed"),
        ({"dp_bucket": "off", "batching": "bucketed"}, None, "bucketed"),
    ],
)
def test_the_user_is_obeyed_then_the_plan(
    given: dict[str, str], planned: str | None, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    meta = {} if planned is None else {"batching": planned}
    plan = make_plan([ReplicaGroup(Layout(1, 1), 1, 64)], meta)
    request: Any = dict.fromkeys(("batching", "dp_bucket", "dispatch")) | given
    assert chosen_batching(**request, plan=plan) == expected
    told = "batching" not in given and bool(given)
    assert bool(caplog.records) == told, "what was not asked for by name is said"


@pytest.mark.parametrize(
    "more", [("--dp-bucket", "off"), ("--dispatch", "group", "--dp-bucket", "on")]
)
def test_options_of_buckets_are_refused_with_packed(
    place: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    assert train(place, "--batching", "packed", *more) == 2
    refused(capsys, f"{more[-2]} {more[-1]}", "or give --batching bucketed")


def test_a_plan_with_another_batching_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = yaml.safe_load(Path("plan.yaml").read_text())
    Path("plan.yaml").write_text(yaml.safe_dump(plan | {"meta": {"batching": "folded"}}))
    assert train(place) == 2
    refused(capsys, 'meta.batching = "folded"', "one of packed, bucketed")


@pytest.mark.parametrize(
    ("batching", "dp_bucket", "dispatch"), [(None, "off", "group"), ("packed", None, None)]
)
def test_variables_ask_for_buckets_unless_an_option_says_packed(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    batching: str | None,
    dp_bucket: str | None,
    dispatch: str | None,
) -> None:
    monkeypatch.setenv("DP_BUCKET", "FALSE")
    monkeypatch.setenv("EXPR_DATA_DISPATCH", "GROUP")
    seen: list[TrainRequest] = []

    def stop(request: TrainRequest) -> None:
        seen.append(request)
        raise ConfigError("seen")

    monkeypatch.setattr("lobra.trainer.run.train", stop)
    with caplog.at_level(logging.WARNING):
        assert train(place, *(("--batching", batching) if batching else ())) == 2
    assert [(seen[0].dp_bucket, seen[0].dispatch)] == [(dp_bucket, dispatch)]
    assert ("no effect" in caplog.text) == (batching == "packed")


def test_the_run_notes_it(place: Path) -> None:
    request = TrainRequest(
        str(place), "tasks.json", "plan.yaml", Path("run"), device="cpu",
        time_profile=Path("time.csv"), num_buckets=7,
    )  # fmt: skip
    assert prepare(request).batching == "packed"
    assert yaml.safe_load(Path("run/config.yaml").read_text())["batching"] == "packed"
