"""The modules that adapters may be on, and other systems' names for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: The linear projections of a Llama layer, in the order adapters are listed.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "embed_tokens", "lm_head"
#: All that adapters may be on.
ADAPTED_MODULES = (*TARGET_MODULES, EMBEDDING, HEAD)
#: Names of other systems for one or several of them: LobRA's are Megatron's, PEFT's
#: `all-linear`, and those of models where several are one.
MODULE_ALIASES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_proj", "up_proj"),
    "dense_4h_to_h": ("down_proj",),
    "all-linear": TARGET_MODULES,
}


def resolve_target_modules(names: Sequence[str]) -> tuple[str, ...]:
    """Return the Hugging Face names of target modules, each once, in the order of the model.

    Raises
    ------
    ValueError
        For a name that is neither in `ADAPTED_MODULES` nor in `MODULE_ALIASES`.
    """
    chosen: set[str] = set()
    for name in names:
        if name in ADAPTED_MODULES:
            chosen.add(name)
        elif name in MODULE_ALIASES:
            chosen.update(MODULE_ALIASES[name])
        else:
            raise ValueError(f"unknown target module {name!r}")
    return tuple(name for name in ADAPTED_MODULES if name in chosen)
