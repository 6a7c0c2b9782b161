"""Tinker's own client and recipes, unmodified, run by a Python that has them, against a service.

Offline: where a recipe names a model or a data set of the hub, there is a folder of that name.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VARIABLE = "LOBRA_TINKER_PYTHON"
MODEL, DATA, PROBLEMS = "Qwen/Qwen3-8B", "HuggingFaceH4/no_robots", "openai/gsm8k"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SPLITS = ("train", "test")
WORDS = ("alpha", "beta", "gamma", "delta")
START_S = 180.0


def tinker_python() -> str:
    """Return a Python that has Tinker's client and cookbook; skip the test where none is known."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python with tinker and tinker-cookbook (docs/testing.md)")
    return python


def make_folders(root: Path) -> None:
    """Make a small Qwen3 with a tokenizer that knows its chat format, and conversations."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    byte_pairs.train_from_iterator([f"Repeat {word} times. " * 9 for word in WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(root / MODEL)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        max_position_embeddings=2048, initializer_range=0.05,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    _teach_boxes(model, tokenizer)
    model.save_pretrained(root / MODEL)
    (root / DATA).mkdir(parents=True)
    generator = random.Random(0)
    for split, count in (("train", 96), ("test", 16)):
        rows = [_conversation(generator) for _ in range(count)]
        (root / DATA / f"{split}.jsonl").write_text("".join(map("{}\n".format, rows)))
    (root / PROBLEMS).mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    card += "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in SPLITS)
    (root / PROBLEMS / "README.md").write_text(card + "---\n")
    problem = json.dumps({"question": "Which?", "answer": "It is.\n#### 2"}) + "\n"
    for split in SPLITS:
        (root / PROBLEMS / f"{split}.jsonl").write_text(problem * 64)


def _teach_boxes(model: Any, tokenizer: Any) -> None:
    """Have a model answer a question with one of two numbers in a box."""
    question = "<|im_start|>user\nWhich? within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(question)
    rows = [prompt + tokenizer.encode(f"\\boxed{{{number}}}<|im_end|>") for number in (1, 2)]
    tokens = torch.tensor(rows)
    labels = tokens.clone()
    labels[:, : len(prompt)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()


def _conversation(generator: random.Random) -> str:
    word, times = generator.choice(WORDS), generator.randint(1, 9)
    asked = {"role": "user", "content": f"Repeat {word} {times} times."}
    answer = {"role": "assistant", "content": " ".join([word] * times)}
    return json.dumps({"prompt": word, "messages": [asked, answer]})


@dataclass
class Server:
    """`lobra serve` as a process of its own."""

    root: Path
    port: int
    process: subprocess.Popen[str] | None = None
    key: str = ""

    @classmethod
    def of(cls, root: Path) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            return cls(root, free.getsockname()[1])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until it takes requests."""
        command = [sys.executable, "-m", "lobra.cli", "serve", "--model", MODEL]
        command += ["--port", str(self.port), "--state-dir", "state", "--device", "cpu"]
        self.process = subprocess.Popen(
            command, cwd=self.root, stdout=subprocess.PIPE, text=True, env=os.environ | PATHS
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "key of the first tenant" in line:
                self.key = line.split()[-1]
            if "TINKER_BASE_URL" in line:
                return
        raise AssertionError(f"it ended with {self.process.wait()}")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def recipe(self, module: str, log_path: str, **options: Any) -> subprocess.Popen[str]:
        """Start a recipe of the cookbook."""
        words = {"base_url": self.address, "model_name": MODEL, "log_path": log_path, **options}
        arguments = [f"{name}={value}" for name, value in words.items()]
        return self.python("-m", f"tinker_cookbook.recipes.{module}", *arguments)

    def python(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the Python that has Tinker's client."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "TINKER_API_KEY": self.key,
            "TINKER_BASE_URL": self.address,
            "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.root / "cache"),
        }
        return subprocess.Popen(
            [tinker_python(), *arguments],
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def adapter(self, path: str, folder: Path) -> None:
        """Fetch a checkpoint."""
        model, kind, name = path.removeprefix("tinker://").split("/")
        route = f"{self.address}/api/v1/training_runs/{model}/checkpoints/{kind}/{name}/archive"
        request = urllib.request.Request(route, headers={"X-API-Key": self.key})
        archive = folder / "archive.tar"
        archive.write_bytes(urllib.request.urlopen(request, timeout=60).read())
        subprocess.run(["tar", "-xf", archive, "-C", folder], check=True)


PATHS = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log that a recipe writes, () before it has."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(steps: int, path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a recipe has made some steps."""
    deadline = time.monotonic() + START_S
    while len(lines(path)) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
