"""Write the golden adapters of this folder anew: `python tests/assets/golden/make.py`.

Two tasks are trained in fp64 on one process, from a base model, adapters and data that lie here
too, so that nothing depends on how a library draws random numbers. `golden.json` then says which
commit and versions wrote `adapters/`. One set serves every plan: in fp64 the three
differ by less than 1e-15 here, and the test's bar is 1e-10. On each plan some micro-batches hold
rows of both tasks.

`--inputs` writes base model, first adapters and data anew too (from raw words of numpy's PCG64, a
stream that numpy promises to keep). The files in `tests/assets/formats` belong to this base model:
writing another one makes them worthless.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lobra.cli import main as lobra
from lobra.common.version import installed_version
from lobra.layout.shapes import ModelShape, module_path, read_shape
from lobra.model.site import PEFT_PREFIX
from lobra.tasks.task_file import load_trainer_config
from lobra.trainer.adapters import adapter_spec, save_adapter

HERE = Path(__file__).resolve().parent
PLAN = "one"
SEED = 20251126
INPUTS = ("base", "start", "data")
LENGTHS = {"long": (10, 60), "short": (5, 32)}  # they overlap: micro-batches hold rows of both
ROWS, VOCAB, NOT_LEARNED = 16, 64, -100


class Words:
    """Numbers from the raw 64-bit words of PCG64."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.PCG64(seed)

    def uniform(self, shape: Sequence[int], bound: float) -> torch.Tensor:
        """Return fp32 numbers, uniform in [-bound, bound)."""
        words = self._generator.random_raw(int(np.prod(shape)))
        unit = (words >> np.uint64(11)).astype(np.float64) / 2.0**53
        return torch.from_numpy(((2 * unit - 1) * bound).reshape(shape).astype(np.float32))

    def integers(self, count: int, low: int, high: int) -> list[int]:
        """Return `count` integers from `low` to below `high` (a range far below 2^64)."""
        words = self._generator.random_raw(count)
        return [int(word) for word in low + words % np.uint64(high - low)]


def write_base(folder: Path, words: Words) -> ModelShape:
    """Write a Llama of three layers: a pipeline of two stages has unequal ones."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    shape = read_shape(folder)
    hidden, tensors = shape.hidden_size, {}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        for module, (inputs, outputs) in shape.linear_sizes().items():
            part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            tensors[f"{prefix}.{part}.{module}.weight"] = words.uniform((outputs, inputs), 0.4)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = 1 + words.uniform((hidden,), 0.1)
    tensors["model.norm.weight"] = 1 + words.uniform((hidden,), 0.1)
    tensors["model.embed_tokens.weight"] = words.uniform((VOCAB, hidden), 0.4)
    tensors["lm_head.weight"] = words.uniform((VOCAB, hidden), 0.4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {name: number for number, name in enumerate(("<pad>", "<s>", "</s>"))}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), VOCAB)}
    PreTrainedTokenizerFast(  # the data are tokens, but not every version does without
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<pad>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>",
    ).save_pretrained(folder)  # fmt: skip
    return shape


def write_inputs() -> None:
    """Write the base model, the data, and an adapter for each task to start from (B not zero)."""
    for name in INPUTS:
        shutil.rmtree(HERE / name, ignore_errors=True)
    words = Words(SEED)
    shape = write_base(HERE / "base", words)
    (HERE / "data").mkdir()
    for name, (shortest, longest) in LENGTHS.items():
        rows = []
        for length in words.integers(ROWS, shortest, longest + 1):
            tokens = words.integers(length, 3, VOCAB)
            prompt = length // 3
            rows.append({"input_ids": tokens, "labels": [NOT_LEARNED] * prompt + tokens[prompt:]})
        text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        (HERE / "data" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for task in load_trainer_config(HERE / "tasks.json").tasks:
        tensors = {}
        for layer in range(shape.num_layers):
            for module in task.target_modules:
                inputs, outputs = shape.linear_sizes()[module]
                name = f"{PEFT_PREFIX}model.layers.{layer}.{module_path(module)}"
                tensors[f"{name}.lora_A.weight"] = words.uniform((task.rank, inputs), 0.3)
                tensors[f"{name}.lora_B.weight"] = words.uniform((outputs, task.rank), 0.1)
        save_adapter(HERE / "start" / task.name, adapter_spec(task), tensors, "base")


def training_arguments(plan: Path, folder: Path) -> list[str]:
    """Return the arguments of `lobra train` in this folder that train these tasks on a plan."""
    return [
        "train", "--model", "base", "--trainer-config", "tasks.json", "--data-dir", "data",
        "--strategy-config", str(plan), "--time-profile", "time.csv", "--device", "cpu",
        "--precision", "fp64", "--num-buckets", "4", "--output-dir", str(folder),
    ]  # fmt: skip


def commit() -> str:
    """Return the commit of the code, with a mark if files that are part of it were changed."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_adapters() -> None:
    """Train, and take the adapters and the losses over."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        code = lobra(training_arguments(Path("plans") / f"{PLAN}.yaml", run))
        if code:
            sys.exit(code)
        for task in load_trainer_config("tasks.json").tasks:
            target = Path("adapters") / f"{task.name}.safetensors"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(run / "adapters" / task.name / "adapter_model.safetensors", target)
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {
        name: [step["tasks"][name]["loss"] for step in steps if name in step["tasks"]]
        for name in steps[0]["tasks"]
    }
    versions = {name: installed_version(name) for name in ("torch", "transformers", "deepspeed")}
    versions["python"] = sys.version.split()[0]
    record = {"commit": commit(), "plan": PLAN, "versions": versions, "losses": losses}
    Path("golden.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--inputs", action="store_true", help="base model and data too")
    asked = parser.parse_args()
    os.chdir(HERE)
    if asked.inputs or not (HERE / "base").is_dir():
        write_inputs()
    write_adapters()
