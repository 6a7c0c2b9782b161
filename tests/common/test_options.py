"""Options: bounds by type, defaults in place of what is wrong, choices from the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args

import pytest

from lobra.cli import make_app, run
from lobra.commands.plan import PATTERNS, Pattern
from lobra.common.errors import ConfigError, Problems
from lobra.common.options import (
    ANY_CASE,
    THIS_MACHINE,
    LauncherOptions,
    NonNegativeInt,
    PositiveInt,
    PositiveNumber,
    Switch,
    as_options,
    from_environment,
    option_problems,
    within_bounds,
)
from lobra.planner import deploy


@as_options
@dataclass(frozen=True, kw_only=True)
class Options:
    steps: PositiveInt = 3
    ranks: tuple[PositiveInt, ...] = ()
    seed: NonNegativeInt | None = None
    limit_s: PositiveNumber = 1.0
    feedback: Annotated[Switch | None, ANY_CASE] = None
    launcher: LauncherOptions = THIS_MACHINE


DEFAULTS = Options()


def test_all_values_out_of_bounds_are_found() -> None:
    assert not option_problems(Options(steps=1, ranks=(1, 2), seed=0, limit_s=1e300))
    launcher = LauncherOptions(server_port=0)
    wrong = Options(steps=0, ranks=(1, 0), seed=-1, limit_s=float("nan"), launcher=launcher)
    assert option_problems(wrong) == [
        "--steps 0: want a positive integer",
        "--ranks 0: want a positive integer",
        "--seed -1: want an integer of 0 or more",
        "--limit-s nan: want a positive number",
        "--server-port 0: want a positive integer",
    ]


def test_defaults_take_the_place_of_what_is_wrong() -> None:
    options, problems = within_bounds(Options(steps=0, seed=4))
    assert options == Options(seed=4)
    assert problems == ["--steps 0: want a positive integer"]


def test_words_become_options() -> None:
    given = []

    def command(*, options: Options = DEFAULTS) -> int:
        given.append(options)
        return 0

    app = make_app(default_command=command)
    words = ["--steps=-1", "--steps", "2", "--ranks", "1", "--ranks", "2", "--feedback", "ON"]
    assert run(app, [*words, "--limit-s", "1e3", "--server-port", "7"]) == 0
    launcher = LauncherOptions(server_port=7)
    assert given == [
        Options(steps=2, ranks=(1, 2), limit_s=1e3, feedback="on", launcher=launcher)
    ]  # fmt: skip
    for wrong in (["--steps", "1.5"], ["--feedback", "maybe"], ["--stepz", "1"], ["--steps"]):
        with pytest.raises(ConfigError, match=wrong[0]):
            run(app, wrong)


def test_an_environment_variable_has_a_known_value_or_none() -> None:
    problems = Problems()
    values = {"TRUE": "on", "FALSE": "off"}
    assert from_environment("A", values, {"A": "true"}, problems) == "on"
    assert from_environment("A", values, {}, problems) is None
    assert not problems
    assert from_environment("A", values, {"A": "yes"}, problems) is None
    assert problems == ["A=yes: want one of TRUE, FALSE"]


def test_every_planner_can_be_asked_for() -> None:
    assert set(get_args(Pattern)) == set(PATTERNS) == set(deploy.PATTERNS)
