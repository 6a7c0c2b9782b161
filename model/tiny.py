"""The `tiny` base model: a small random Llama with a tokenizer trained on the embedded corpus.

It exists so that the whole system runs on a machine without GPU, network or data.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from lobra.layout.shapes import NAMED_SHAPES, TINY
from lobra.tasks.corpus import corpus_texts
from lobra.tasks.tokenizer import train_tokenizer

log = logging.getLogger(__name__)

SEED = 20250801
# Wider than Llama's 0.02: with a frozen random head the logits must be able to leave uniform.
INITIALIZER_RANGE = 0.08


def build_tiny(folder: Path) -> Path:
    """Build the tiny model in `folder` (atomically, deterministically) and return the folder."""
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = NAMED_SHAPES[TINY]
    log.info("building the tiny base model in %s", folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(corpus_texts(), shape.vocab_size),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=8192,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)  # a temporary folder is private at first
        for file in draft.iterdir():
            file.chmod(0o644)
        try:
            os.rename(draft, folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise  # not merely another process that was faster
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
