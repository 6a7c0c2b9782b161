from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from lobra.commands.simulate import add_arguments, run
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, make_plan, save_plan
from tests.commands.test_plan import files  # noqa: F401 (a fixture)


def test_lobra_simulate_writes_its_three_files(
    files: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan([ReplicaGroup(Layout(1, 1), 2, 1024), ReplicaGroup(Layout(2, 1), 1, 2048)])
    save_plan(plan, files / "plan.yaml")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(
        [
            *("--model", "tiny", "--trainer-config", "config.json", "--strategy-config"),
            *("plan.yaml", "--time-profile", "time.csv", "--memory-profile", "memory.csv"),
            *("--lengths", "lengths.json", "--steps", "3", "--output-dir", "sim", "--json"),
        ]
    )
    assert run(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in result["runs"]] == [3] * len(result["runs"])
    assert json.loads((files / "sim/trace.json").read_text())["traceEvents"]
    rows = (files / "sim/steps.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * len(result["runs"])
    assert json.loads((files / "sim/simulation.json").read_text()) == result["runs"]
    args.steps, args.seed, args.num_buckets, args.output_dir = 0, -1, 0, "time.csv/sim"
    with pytest.raises(ConfigError) as caught:
        run(args)
    for words in ("--steps: 0", "--seed: -1", "--num-buckets: 0", "--output-dir: time.csv/sim"):
        assert words in str(caught.value)
