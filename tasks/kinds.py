"""The kinds of adapters and optimisers a task may have, and which fields only some of them have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lobra.tasks.target_modules import TARGET_MODULES

ADAPTERS = ("lora", "rslora", "pissa", "dora", "vera")
FULL = "full"  # no adapter: the base's own weights
#: What only adapters have, with values that mean nothing where there is none.
OF_ADAPTERS: Mapping[str, Any] = {
    **dict(rank=1, lora_alpha=1, target_modules=list(TARGET_MODULES), lora_dropout=0.0),
    **dict(loraplus_ratio=1.0, rank_pattern={}, alpha_pattern={}, projection_prng_key=0),
    **dict(modules_to_save=(), bias="none", resume_from=None),
}
BIASES = ("none", "all", "lora_only")
ADAMW_8BIT = "adamw8bit"
_ADAMS = ("adamw", ADAMW_8BIT)
OPTIMIZERS = (*_ADAMS, "sgd")
OF_OPTIMIZER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), _ADAMS),
    "momentum": ("sgd",),
}
LR_SCHEDULERS = ("constant", "linear", "cosine")
