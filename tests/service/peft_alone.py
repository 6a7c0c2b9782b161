"""What PEFT gets for a tenant's requests on one process, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lobra.service.wire import Datum
from tests.trainer.alone import lift_to_double
from tests.trainer.double import NoSinglePrecision


@dataclass(frozen=True)
class Step:
    """The data of one or more calls of `forward_backward`, then the settings of `optim_step`."""

    calls: tuple[tuple[Datum, ...], ...]
    adam: dict[str, float]


def train_with_peft(
    base: Path, start: Path, steps: Sequence[Step], folder: Path
) -> tuple[dict[str, torch.Tensor], list[np.ndarray]]:
    """Return the adapter that PEFT gets from a start, and the logprobs of all data on the way."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    model = PeftModel.from_pretrained(plain, start, is_trainable=True)
    lift_to_double(plain)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    found = []
    for step in steps:
        optimizer.param_groups[0].update(
            lr=step.adam["learning_rate"],
            betas=(step.adam["beta1"], step.adam["beta2"]),
            eps=step.adam["eps"],
            weight_decay=step.adam["weight_decay"],
        )
        optimizer.zero_grad()
        for datum in (datum for call in step.calls for datum in call):
            with NoSinglePrecision():
                tokens = torch.from_numpy(datum.tokens.astype(np.int64))[None]
                logprobs = model(input_ids=tokens).logits[0].log_softmax(-1)
                labels = torch.from_numpy(datum.labels.astype(np.int64))
                own = logprobs.gather(-1, labels[:, None])[:, 0]
                (-own * torch.from_numpy(datum.weights)).sum().backward()
            found.append(own.detach().numpy())
        if step.adam["grad_clip_norm"]:
            torch.nn.utils.clip_grad_norm_(trainable, step.adam["grad_clip_norm"])
        optimizer.step()
    model.save_pretrained(folder, save_embedding_layers=False)
    return load_file(folder / "adapter_model.safetensors"), found
