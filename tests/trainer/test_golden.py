"""Adapters trained by an earlier commit, to the last digits but four: nothing may change them.

Three plans, one set of adapters (`tests/assets/golden/make.py` says why and writes it). Base model,
first adapters and data are stored, so no library's random numbers are in it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lobra.cli import main
from lobra.layout.plan import load_plan
from lobra.trainer.metrics import read_metrics
from tests.assets.golden.make import HERE, training_arguments

BAR = 1e-10
PLANS = {"one": "<1,1>x1", "mixed": "<1,1>x2 <2,1>x1 <1,2>x1", "stages": "<1,2>x1 <2,2>x1"}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "batching"), [*((name, "packed") for name in PLANS), ("mixed", "bucketed")]
)
def test_golden_adapters(
    name: str, batching: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)
    plan = Path("plans") / f"{name}.yaml"
    assert str(load_plan(plan)) == PLANS[name]
    arguments = [*training_arguments(plan, tmp_path / "run"), "--batching", batching]
    assert main(arguments) == 0

    golden = sorted(Path("adapters").glob("*.safetensors"))
    assert [path.stem for path in golden] == ["everything", "few"]
    for path in golden:
        trained = load_file(tmp_path / "run" / "adapters" / path.stem / "adapter_model.safetensors")
        expected = load_file(path)
        assert trained.keys() == expected.keys()
        start = load_file(Path("start") / path.stem / "adapter_model.safetensors")
        for key, value in expected.items():
            assert trained[key].dtype == value.dtype == torch.float64
            error = float((trained[key] - value).norm() / value.norm())
            assert error < BAR, f"{path.stem} {key}: relative error {error:.1e}"
            assert (value - start[key]).norm() > 1e-2 * start[key].norm(), f"{key} has not learned"

    steps = read_metrics(tmp_path / "run")
    for task, losses in json.loads(Path("golden.json").read_text())["losses"].items():
        seen = [step["tasks"][task]["loss"] for step in steps if task in step["tasks"]]
        np.testing.assert_allclose(seen, losses, rtol=BAR, atol=0)
