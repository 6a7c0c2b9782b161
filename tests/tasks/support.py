"""A small tokenizer and a task, for tests."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic
from lobra.tasks.config import TaskConfig
from lobra.tasks.prompts import Template
from lobra.tasks.tokenizer import BOS, EOS, PAD, load_tokenizer, train_tokenizer

TEXTS = [
    "Write a haiku about rain.",
    "def add(a, b):\n    return a + b\n",
    "the cat sat on the mat",
]
# A template in the manner of ChatML; the content of a message is stripped.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def task(**changes: Any) -> TaskConfig:
    base = TaskConfig("t", 4, 8, ("q_proj",), 4, "rows", 512, steps=5)
    return replace(base, **changes)


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer of `train_tokenizer` as a Hugging Face folder's tokenizer files."""
    folder = Path(folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_atomic(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


def rendered(template: Template, instruction: str, given: str, output: str) -> tuple[str, str]:
    """Return (prompt, target) of one example."""
    pieces = template.pieces(instruction, given, output)
    prompt, target = (
        "".join(piece.text for piece in pieces if piece.is_learned == is_learned)
        for is_learned in (False, True)
    )
    return prompt, target


def small_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """Return a tokenizer of 300 tokens, loaded from a folder it was saved to."""
    tokenizer = train_tokenizer(TEXTS, 300)
    if chat_template:
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_tokenizer(tokenizer, folder)
    if chat_template:
        (folder / "chat_template.jinja").write_text(chat_template)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
        path.write_text(json.dumps(config))
    return load_tokenizer(folder)


def write_rows(folder: Path, *rows: Any, name: str = "rows") -> Path:
    """Write a JSONL file; texts as they are, everything else as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
