"""On a base in eight or four bits, jointly on any plan, a task gets what PEFT gets alone on it.

PEFT's base has in plain floating point the values that bitsandbytes makes of the quantised weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from lobra.layout.base_precision import QUANTISED
from lobra.layout.shapes import read_shape
from lobra.model.site import sites
from lobra.trainer.adapters import adapter_spec
from lobra.trainer.metrics import read_metrics
from lobra.trainer.run import run_local
from lobra.trainer.verify import verify
from tests.model.quantised import in_e4m3, save_dequantised
from tests.model.support import FAMILIES, save_family, save_llama
from tests.trainer.alone import (
    VOCAB,
    make_datasets,
    make_starts,
    peft_config,
    task_config,
    tasks_from,
    train_alone,
)
from tests.trainer.command import refused, train, write_config, write_plan
from tests.trainer.support import make_plan, make_run
from tests.trainer.test_equality import final_tensors, losses_of, relative_errors
from tests.trainer.test_variants import task

TASKS = (
    task("plain", steps=3),
    task("random", adapter="vera", rank=16, learning_rate=0.02, steps=3),
    task("fresh", adapter="dora", steps=3),
)
BAR = 1e-8
LAYOUTS = [(1, 1), (2, 1), (1, 2)]
#: A row-parallel shard's tokens have other scales than whole ones, by which values are rounded
#: otherwise that are 2^13 times smaller than the largest; that decides how later ones are rounded.
FP8_LAYOUTS = [(1, 1), (1, 2)]


def _with_rounded_input(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return what a linear computes; of the base's layers with an input in fp8.

    The gradient goes through as if nothing was rounded.
    """
    if not linear.weight.requires_grad and linear.out_features != VOCAB:
        rounded = in_e4m3(x.detach().flatten(0, -2)).view(x.shape)
        x = x + (rounded - x.detach())
    return torch.nn.functional.linear(x, linear.weight, linear.bias)


@pytest.mark.parametrize(
    "quantised",
    [
        "nf4",
        pytest.param("int8", marks=pytest.mark.long),
        pytest.param("fp8", marks=pytest.mark.long),
    ],
)
def test_joint_equals_alone(
    quantised: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = save_llama(tmp_path / "base", intermediate_size=192)
    plain = save_dequantised(base, tmp_path / "plain", quantised)
    shape, data = read_shape(base), make_datasets(len(TASKS))
    starts = make_starts(plain, tmp_path / "starts", TASKS[:2])
    fresh = task_config(TASKS[2])
    plan = make_plan(FP8_LAYOUTS if quantised == "fp8" else LAYOUTS, max_tokens=128)
    run = make_run(
        tmp_path / "run", base, (*tasks_from(starts, TASKS[:2]), fresh), data, plan, 3,
        precision="fp64", base_precision=quantised,
    )  # fmt: skip
    run_local(run)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64),
        peft_config(TASKS[2], shape),
    )
    for site in sites(shape):  # PEFT is given our A
        if not (tensors := adapter_spec(fresh).tensors(site)):
            continue
        A = tensors[0].start()
        model.base_model.model.get_submodule(site.path).lora_A["default"].weight.data = A.double()
    starts.append(tmp_path / "starts" / "fresh")
    model.save_pretrained(starts[-1])
    if quantised == "fp8":
        monkeypatch.setattr(torch.nn.Linear, "forward", _with_rounded_input)
    alone = train_alone(plain, data, starts, torch.float64, tasks=TASKS)
    for number, own in enumerate(run.tasks):
        errors = relative_errors(final_tensors(run, number), alone[number]["tensors"])
        for name, error in errors.items():
            assert error < BAR, f"{own.name} {name}: relative error {error:.1e}"
        record_property(own.name, f"{max(errors.values()):.1e}")
        losses = losses_of(run, own.name)
        np.testing.assert_allclose(losses, alone[number]["losses"], rtol=BAR, atol=0)


@pytest.mark.long
@pytest.mark.parametrize("quantised", QUANTISED)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_alone(
    family: str, quantised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_family(family, tmp_path / "base", intermediate_size=192)
    plain = save_dequantised(base, tmp_path / "plain", quantised)
    data, tasks = make_datasets(1), (task("plain", steps=1, lora_dropout=0.2),)
    starts = make_starts(plain, tmp_path / "starts", tasks)
    plan = make_plan([(1, 1)], max_tokens=128)
    run = make_run(
        tmp_path / "run", base, tasks_from(starts, tasks), data, plan, 1,
        precision="fp64", base_precision=quantised,
    )  # fmt: skip
    run_local(run)
    if quantised == "fp8":
        monkeypatch.setattr(torch.nn.Linear, "forward", _with_rounded_input)
    (alone,) = train_alone(plain, data, starts, torch.float64, tasks=tasks)
    errors = relative_errors(final_tensors(run, 0), alone["tensors"])
    assert max(errors.values()) < BAR, errors
    np.testing.assert_allclose(losses_of(run, "plain"), alone["losses"], rtol=BAR, atol=0)


def test_a_run_knows_its_base(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_config(steps=3)
    assert train(place, "--base-precision", "nf4", "--max-steps", "2", "--save-every", "1") == 0
    assert "time.csv: is of a base not quantised, this one is in nf4" in caplog.text
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["base_precision"] == "nf4"
    (card,) = Path("run/adapters").glob("*/README.md")
    assert "| precision of the base | nf4 |" in card.read_text()
    assert verify(Path("run")).is_true
    assert train(place, "--resume") == 2
    assert "trained on a base in nf4: give --base-precision nf4" in capsys.readouterr().err
    assert train(place, "--resume", "--base-precision", "nf4") == 0
    assert len(read_metrics(Path("run"))) == 3


def test_what_cannot_be_is_refused_before_the_start(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan({"dp": 1, "tp": 2, "pp": 1, "max_tokens": 64})
    write_config(adapter="pissa")
    monkeypatch.setattr("lobra.layout.base_precision.find_spec", lambda name: None)
    assert train(place, "--base-precision", "nf4") == 2
    words = ["a row of down_proj has 96 values", "adapter: pissa starts from the weights"]
    refused(capsys, *words, "needs bitsandbytes: pip install 'lobra[quantised]'")
    assert train(place, "--base-precision", "bf16") == 2
    refused(capsys, "--base-precision bf16: a base that is not quantised has the precision")
    group = {"dp": 1, "tp": 1, "pp": 1, "max_tokens": 64}
    plan = {"strategy_config": [group], "meta": {"base_precision": "nf4"}}
    Path("plan.yaml").write_text(yaml.safe_dump(plan))
    assert train(place, "--base-precision", "int8") == 2
    refused(capsys, "the plan was made for a base in nf4, which leaves more room")
