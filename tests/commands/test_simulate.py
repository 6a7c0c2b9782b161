from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lobra.commands.simulate import SimulateOptions
from lobra.commands.simulate import simulate as run_simulation
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
    options = SimulateOptions(
        model="tiny", trainer_config="config.json", strategy_config="plan.yaml",
        time_profile=Path("time.csv"), memory_profile=Path("memory.csv"),
        lengths=Path("lengths.json"), steps=3, output_dir=Path("sim"), json=True,
    )  # fmt: skip
    assert run_simulation(options=options) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["steps"] for entry in result["runs"]] == [3] * len(result["runs"])
    assert json.loads((files / "sim/trace.json").read_text())["traceEvents"]
    rows = (files / "sim/steps.csv").read_text().splitlines()
    assert len(rows) == 1 + 3 * len(result["runs"])
    assert json.loads((files / "sim/simulation.json").read_text()) == result["runs"]
    whose = {run["name"]: run["of_plan"] for run in result["runs"]}
    assert not whose["Task-Fused, 7 fixed buckets"] and whose["balanced, dynamic buckets"]
    without = replace(options, memory_profile=None, output_dir=None)
    assert run_simulation(options=without) == 0
    (reason,) = json.loads(capsys.readouterr().out)["left_out"]
    assert "max_tokens_tiny_2tasks.csv: no such profile" in reason
    found = files / "exp_result/profile/memory/max_tokens_tiny_2tasks.csv"
    found.parent.mkdir(parents=True)
    (files / "memory.csv").rename(found)
    assert run_simulation(options=without) == 0
    again = json.loads(capsys.readouterr().out)["runs"]
    assert [run["name"] for run in again] == [run["name"] for run in result["runs"]]
    wrong = replace(options, steps=0, seed=-1, num_buckets=0, output_dir=Path("time.csv/sim"))
    with pytest.raises(ConfigError) as caught:
        run_simulation(options=wrong)
    for words in ("--steps 0", "--seed -1", "--num-buckets 0", "--output-dir: time.csv/sim"):
        assert words in str(caught.value)
