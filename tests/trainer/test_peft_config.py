"""Only adapters that mean plain LoRA are a start for a task; PEFT itself makes the others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lobra.layout.shapes import read_shape
from lobra.model.adapter import AdapterSpec
from lobra.trainer.adapters import check_adapter
from lobra.trainer.peft_config import FIELDS, FREE, config_problems
from tests.model.support import save_llama

MODULES = ("q_proj", "v_proj", "down_proj")
SPEC = AdapterSpec("mine", 4, 8.0, MODULES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("peft") / "base", num_hidden_layers=2)


def make(base: Path, folder: Path, **fields: Any) -> Path:
    """Save an adapter made by PEFT."""
    given = dict(r=4, lora_alpha=8, target_modules=list(MODULES), task_type="CAUSAL_LM") | fields
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**given))
    model.save_pretrained(folder)
    return folder


def problems_of(base: Path, folder: Path) -> list[str]:
    return list(check_adapter(folder, SPEC, read_shape(base)))


def test_every_field_of_peft_is_judged_and_its_defaults_are_plain() -> None:
    kinds = (LoraConfig, VeraConfig)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert known <= {*FIELDS, *FREE}
    assert not set(FIELDS) & set(FREE)
    assert all(config_problems(kind().to_dict()) == [] for kind in kinds)


PLAIN: list[dict[str, Any]] = [
    {},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"target_modules": ".*layers.*(q_proj|v_proj|down_proj)"},
    {"target_modules": "all-linear", "exclude_modules": r".*([ko]|gate|up)_proj"},
    {"lora_dropout": 0.1, "inference_mode": True, "revision": "main"},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 8}},
]  # fmt: skip


@pytest.mark.parametrize("fields", PLAIN, ids=str)
def test_plain_lora_is_accepted(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    assert problems_of(base, make(base, tmp_path, **fields)) == []


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("init_lora_weights", {"init_lora_weights": "pissa"}),
    ("init_lora_weights", {"init_lora_weights": "pissa_niter_4"}),
    ("init_lora_weights", {"init_lora_weights": "olora"}),
    ("init_lora_weights", {"init_lora_weights": "mica"}),
    ("lora_bias", {"lora_bias": True}),
    ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
    ("alora_invocation_tokens", {"alora_invocation_tokens": [1, 2]}),
    ("layer_replication", {"layer_replication": [(0, 2), (0, 2)]}),
    ("target_parameters", {"target_parameters": ["o_proj.weight"]}),
]


@pytest.mark.parametrize(("field", "fields"), OTHERS, ids=str)
def test_what_peft_makes_otherwise_is_refused_by_name(
    base: Path, tmp_path: Path, field: str, fields: dict[str, Any]
) -> None:
    problems = problems_of(base, make(base, tmp_path, **fields))
    (named,) = [problem for problem in problems if f"adapter_config.json: {field} = " in problem]
    assert str(tmp_path) in named and "task mine" in named


#: What this machine's PEFT cannot make, as it would spell it.
SPELT: list[tuple[str, Any]] = [
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "somebody's"),
    ("task_type", "SEQ_CLS"),
    ("fan_in_fan_out", True),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("velora_config", {"num_groups": 2}),
    ("monteclora_config", {"n": 2}),
    ("arrow_config", {"top_k": 2}),
    ("kasa_config", {"beta": 1}),
    ("megatron_config", {"tensor_model_parallel_size": 2}),
    ("a_field_of_tomorrow", [1]),
]


@pytest.mark.parametrize(("field", "value"), SPELT, ids=str)
def test_other_values_are_refused_by_name(
    base: Path, tmp_path: Path, field: str, value: Any
) -> None:
    path = make(base, tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    (problem,) = problems_of(base, tmp_path)
    assert f"{path}: {field} = {json.dumps(value)}: " in problem


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_not_set_is_no_matter(
    base: Path, tmp_path: Path, value: Any
) -> None:
    path = make(base, tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_field_of_tomorrow": value}))
    assert problems_of(base, tmp_path) == []


@pytest.mark.parametrize("content", ["[1]", "3", "null", '"text"'])
def test_a_configuration_that_is_no_object(base: Path, tmp_path: Path, content: str) -> None:
    path = make(base, tmp_path) / "adapter_config.json"
    path.write_text(content)
    (problem,) = problems_of(base, tmp_path)
    assert f"{path}: holds {content}, want an object" in problem


def logits_of(base: Path, wrap: Callable[[Any], Any]) -> torch.Tensor:
    tokens = torch.arange(40).reshape(2, 20) + 3
    with torch.no_grad():
        return wrap(AutoModelForCausalLM.from_pretrained(base))(tokens).logits


def test_the_remedy_that_is_named_keeps_the_model(base: Path, tmp_path: Path) -> None:
    """PiSSA, converted by PEFT, is plain LoRA of twice the rank on the published base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    given = dict(r=4, lora_alpha=8, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(init_lora_weights="pissa", **given))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.01 * torch.randn_like(weight)
        theirs = model(torch.arange(40).reshape(2, 20) + 3).logits
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    spec = dataclasses.replace(SPEC, rank=8, alpha=16)
    assert check_adapter(tmp_path / "plain", spec, read_shape(base)) == []
    ours = logits_of(base, lambda model: PeftModel.from_pretrained(model, tmp_path / "plain"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}}


@pytest.mark.parametrize(
    "fields",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["norm", "input_layernorm"]},
        *({key: own} for key, own in PATTERNS.items()),
    ],
    ids=str,
)
def test_rank_and_scale_are_the_task_s(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """What PEFT makes so is a start for a task that says so, and for no other."""
    folder = make(base, tmp_path, **fields)
    problems = problems_of(base, folder)
    assert any(f"{field} is " in problem for problem in problems for field in fields)
    kinds = [name.removeprefix("use_") for name in fields if name.startswith("use_")]
    spec = dataclasses.replace(SPEC, kind=kinds[0] if kinds else "lora")
    own: dict[str, Any] = {key: tuple(fields.get(key, {}).items()) for key in PATTERNS}
    own |= {"bias": fields.get("bias", "none")}
    own |= {"modules_to_save": tuple(fields.get("modules_to_save", ()))}
    assert check_adapter(folder, dataclasses.replace(spec, **own), read_shape(base)) == []


@pytest.mark.parametrize("kind", ["ADALORA", "VERA", None])
def test_another_method_is_refused(base: Path, tmp_path: Path, kind: str | None) -> None:
    path = make(base, tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": kind}))
    (problem,) = problems_of(base, tmp_path)
    assert f"{path}: peft_type is {kind!r}, the task says adapter: lora" in problem
