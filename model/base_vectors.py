"""The vectors of a base model, which tasks may train as they are: norms' weights and biases."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from lobra.layout.shapes import ModelShape


@lru_cache(maxsize=8)
def base_vectors(shape: ModelShape) -> dict[int, dict[str, int]]:
    """Return of every layer the size of each vector, by its name in the checkpoint.

    As transformers builds the model; of a shape that is known by name only, those of a Llama. The
    final norm is in the layer after the last.

    Raises
    ------
    ConfigError
        Transformers builds no model from the folder's config.json.
    """
    found: dict[int, dict[str, int]] = {layer: {} for layer in shape.adapted_layers}
    for name, (size, *more) in _tensor_sizes(shape).items():
        if not more:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            found[int(layer[1]) if layer else shape.num_layers][name] = size
    return found


def _tensor_sizes(shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
    if shape.path is not None:
        from lobra.model.checkpoint import needed_tensors  # imports torch and transformers

        return needed_tensors(shape.path, shape)
    norms = [
        f"model.layers.{layer}.{norm}.weight"
        for layer in range(shape.num_layers)
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    return dict.fromkeys([*norms, "model.norm.weight"], (shape.hidden_size,))


def is_trained_norm(modules_to_save: Iterable[str], name: str) -> bool:
    """Return whether a vector of the base is a norm's weight that PEFT's `modules_to_save` means.

    PEFT asks whether the path ends with a key; no other module's path ends as those of norms do.
    """
    return any(name.endswith(f"{key}.weight") for key in modules_to_save)


def is_trained_bias(bias: str, target_modules: Collection[str], name: str) -> bool:
    """Return whether a vector of the base is a bias that PEFT's `bias` means."""
    *_, module, parameter = name.split(".")
    of_target = bias == "lora_only" and module in target_modules
    return parameter == "bias" and (bias == "all" or of_target)
