"""`lobra export` and `lobra generate`: a merged model says what base and adapter say together."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lobra.cli import main

PROMPT = "def first(cat):"


@pytest.fixture
def adapters(place: Path) -> list[str]:
    """Return two adapters that change what the base says."""
    torch.manual_seed(0)
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(place), config).save_pretrained(name)
    return ["one", "two"]


def answers(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert main(["generate", "--max-new-tokens", "8", "--json", *words]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["prompt"] == PROMPT
    return entry["answers"]


def test_a_merged_model_answers_as_base_and_adapter(
    place: Path, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, one, two = str(place), *adapters
    told = answers(
        capsys, "--model", model, "--adapter", one, "--adapter", two, "--base", "--prompt", PROMPT
    )
    assert list(told) == ["base", one, two] and len(set(told.values())) == 3
    tokenizer = AutoTokenizer.from_pretrained(place)
    for name, text in told.items():
        oracle = AutoModelForCausalLM.from_pretrained(place)
        if name != "base":
            oracle = PeftModel.from_pretrained(oracle, name)
        tokens = tokenizer(PROMPT, return_tensors="pt")
        said = oracle.generate(**tokens, max_new_tokens=8, do_sample=False)
        assert text == tokenizer.decode(said[0, tokens.input_ids.shape[1] :], True)
    assert main(["export", "--model", model, "--adapter", one, "--output-dir", "merged"]) == 0
    capsys.readouterr()
    assert answers(capsys, "--model", "merged", "--prompt", PROMPT) == {"base": told[one]}


def test_a_prompt_from_standard_input(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = answers(capsys, "--model", str(place), "--prompt", PROMPT)
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", "--model", str(place), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"prompt: {PROMPT}\n--- base\n{given['base']}\n"
    drawn = ["--prompt", PROMPT, "--temperature", "9", "--seed"]
    first, again, other = (
        answers(capsys, "--model", str(place), *drawn, seed) for seed in ("1", "1", "2")
    )
    assert first == again != other


def test_all_mistakes_at_once(
    place: Path, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(place), "--adapter", "one", "--adapter", "nowhere"]
    Path("there").mkdir()
    assert main(["export", *words, "--weight", "1", "--output-dir", "there"]) == 2
    said = capsys.readouterr().err
    assert "1 for 2 adapters" in said and "is there already" in said and "nowhere" in said
    assert main(["generate", *words, "--max-new-tokens", "0", "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said and "--max-new-tokens 0" in said
    words = ["--model", str(place), "--adapter", str(place), "--output-dir", "new"]
    assert main(["export", *words]) == 2
    assert "is a whole model, no adapter" in capsys.readouterr().err


def test_what_may_have_been_meant_by_a_folder_without_an_adapter(
    place: Path, adapters: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(place), "--prompt", "a"]
    for given, said in (
        (str(place), "is a whole model, no adapter: give it as --model"),
        (".", "holds no adapter_config.json; give one of one, two"),
        ("tow", "no such folder"),
    ):
        assert main(["generate", *words, "--adapter", given]) == 2
        assert f"--adapter {given}: {said}" in capsys.readouterr().err
