"""A merged model is what PEFT's `merge_and_unload` gives, whatever adapters PEFT made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lobra.common.errors import ConfigError
from lobra.trainer.merge import merge_problems, read_adapter, write_merged
from tests.model.support import save_llama

KINDS: dict[str, dict[str, Any]] = {
    "lora": dict(target_modules=["q_proj", "down_proj"]),
    "other": dict(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"]),
    "rslora": dict(use_rslora=True, target_modules="all-linear"),
    "dora": dict(use_dora=True, target_modules=["k_proj", "up_proj"]),
    "patterns": dict(
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 3},
        alpha_pattern={r"layers\.[01]\.self_attn\.v_proj": 5, "v_proj": 7},
    ),
    "ends": dict(target_modules=["embed_tokens", "lm_head"], modules_to_save=["input_layernorm"]),
    "bias": dict(target_modules=["q_proj"], bias="all"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(
        tmp_path_factory.mktemp("merge") / "base", num_hidden_layers=2, attention_bias=True
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.md").write_text("not of the model")
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[str, Path]:
    """One adapter of every kind, all of its tensors random."""
    torch.manual_seed(1)
    for kind, settings in KINDS.items():
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(base.parent / kind)
    return {kind: base.parent / kind for kind in KINDS}


def merged_by_peft(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder
    ).merge_and_unload()


def check_equal(folder: Path, expected: Any) -> None:
    found = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_as_merge_and_unload(
    kind: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = read_adapter(adapters[kind])
    assert merge_problems(base, [adapter], [1.0]) == []
    write_merged(base, [adapter], [1.0], tmp_path / "merged")
    check_equal(tmp_path / "merged", merged_by_peft(base, adapters[kind]))
    plain = {path.name for path in base.iterdir()} - {"notes.md"}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == plain
    assert len([name for name in plain if name.endswith(".safetensors")]) > 2


def test_several_adapters_as_cat(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    names, weights = ["lora", "other"], [0.7, 1.5]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapters["lora"], adapter_name="lora"
    )
    model.load_adapter(adapters["other"], adapter_name="other")
    model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    write_merged(base, [read_adapter(adapters[n]) for n in names], weights, tmp_path / "merged")
    check_equal(tmp_path / "merged", model.merge_and_unload(adapter_names=["sum"]))


def test_a_base_in_bf16_stays_so(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    write_merged(half, [read_adapter(adapters["lora"])], [1.0], tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found.values())
    for name, value in merged_by_peft(half, adapters["lora"]).state_dict().items():
        assert torch.equal(found[name], value), name


def test_what_cannot_be_merged_is_refused(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    lora, dora, ends = (read_adapter(adapters[kind]) for kind in ("lora", "dora", "ends"))
    (problem,) = merge_problems(base, [lora, dora], [1.0, 1.0])
    assert "DoRA" in problem and "merge it alone" in problem
    assert "weight 1" in merge_problems(base, [dora], [0.5])[0]
    small = save_llama(tmp_path / "small", num_hidden_layers=1, tie_word_embeddings=True)
    problems = "\n".join(merge_problems(small, [lora, ends], [1.0, 1.0]))
    assert "layers.1.self_attn.q_proj.weight" in problems and "another base" in problems
    assert "embedding and head" in problems
    vera = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), VeraConfig(target_modules=["q_proj"])
    )
    vera.save_pretrained(tmp_path / "vera")
    with pytest.raises(ConfigError):
        read_adapter(tmp_path / "vera")
    shutil.copytree(adapters["lora"], tmp_path / "pissa")
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text())
    (tmp_path / "pissa" / "adapter_config.json").write_text(
        json.dumps({**config, "init_lora_weights": "pissa", "peft_type": "ADALORA"})
    )
    with pytest.raises(ConfigError, match="pissa(.|\n)*ADALORA"):
        read_adapter(tmp_path / "pissa")
    with pytest.raises(ConfigError, match="no adapter in PEFT's format"):
        read_adapter(tmp_path)
