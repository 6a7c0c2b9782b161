"""What a PEFT `adapter_config.json` may say for its tensors to mean here what they mean there.

That is LoRA, rsLoRA, DoRA or VeRA on a base that is as published, and norms and biases of it that
were trained as they are. An allow list: a field of PEFT's `LoraConfig` or `VeraConfig` is named
below with the values that keep this meaning, and whatever else is set, known or not, is refused by
name. What the table does not judge is judged elsewhere: kind, rank and scale against the task,
modules and layers by the tensors that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lobra.common.errors import show

#: Returns why a value of a field, in this configuration, is refused; None for one that is not.
FieldCheck = Callable[[Any, Mapping[str, Any]], str | None]

#: Fields that say nothing about what the tensors mean, whatever their value.
FREE = (
    # where it came from, and how it was made or is to be run
    "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
    "runtime_config", "lora_dropout",
    # which modules and layers: the tensors themselves say it
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # settings of an option that is judged by its own field, and without it are not used
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "corda_config",
    "lora_ga_config", "ensure_weight_tying",
    # compared with the task by `trainer.adapters.check_adapter`
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "peft_type",
    "projection_prng_key", "modules_to_save", "bias",
    # how VeRA was made: the vectors themselves say it
    "vera_dropout", "d_initial", "init_weights", "save_projection",
)  # fmt: skip

#: Initialisations that leave the base as it is, only with other first values: once saved, A and
#: B are plain LoRA. (The ranks that EVA gives to modules are in `rank_pattern`.)
PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva")
#: Initialisations that take B @ A out of the base's weights: the adapter belongs to what is left.
CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")

CONVERT = (
    "convert it into plain LoRA with PEFT (save_pretrained with "
    "path_initial_model_for_weight_conversion)"
)


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Return field, value and why it is refused, of all that does not mean plain LoRA."""
    found = []
    for field in sorted(config, key=str):
        value = config.get(field)
        if field in FREE:
            continue
        reason = FIELDS[field](value, config) if field in FIELDS else _unknown(value)
        if reason:
            found.append(f"{field} = {show(value)}: {reason}")
    return found


def _unknown(value: Any) -> str | None:
    return "is not known here, so the adapter may not be plain LoRA" if value else None


def _unset(reason: str) -> FieldCheck:
    """Return a check that accepts null, false and empty values only."""
    return lambda value, config: reason if value else None


def _one_of(values: tuple[Any, ...], reason: str) -> FieldCheck:
    return lambda value, config: None if value in values else reason


def _initialisation(value: Any, config: Mapping[str, Any]) -> str | None:
    kind = str(value).lower()
    if kind in PLAIN_INITS:
        return None
    if kind in CONVERTIBLE_INITS or kind.startswith("pissa_niter_"):
        return f"its base has other weights than the published model: {CONVERT}"
    if kind == "loftq":
        return "it belongs to a base that LoftQ has quantised, not to the published model"
    if kind == "mica":
        return "MiCA trains A only, which is not supported"
    return "is no initialisation known here, so the adapter may not be plain LoRA"


_OTHER_METHOD = "is not plain LoRA and not supported"
_OTHER_PARAMETERS = "is not supported: train without it"

#: Every other field of PEFT's LoraConfig, and what of it is refused.
FIELDS: Mapping[str, FieldCheck] = {
    "task_type": _one_of((None, "CAUSAL_LM"), "only CAUSAL_LM is supported"),
    "init_lora_weights": _initialisation,
    "lora_bias": _unset("a bias in the adapter is not supported"),
    "fan_in_fan_out": _unset("it is for weights stored transposed, which no supported model has"),
    "trainable_token_indices": _unset(_OTHER_PARAMETERS),
    "target_parameters": _unset(_OTHER_PARAMETERS),
    "layer_replication": _unset("its base repeats layers, the published model does not"),
    "megatron_config": _unset("adapters of Megatron's linears are not supported"),
    "use_qalora": _unset(f"QALoRA {_OTHER_METHOD}"),
    "use_bdlora": _unset(f"BD-LoRA {_OTHER_METHOD}"),
    "velora_config": _unset(f"VeLoRA {_OTHER_METHOD}"),
    "alora_invocation_tokens": _unset(f"aLoRA {_OTHER_METHOD}"),
    "monteclora_config": _unset(f"MonteCLoRA {_OTHER_METHOD}"),
    "arrow_config": _unset(f"Arrow, a router over adapters, {_OTHER_METHOD}"),
    "kasa_config": _unset(f"KaSA {_OTHER_METHOD}"),
}
