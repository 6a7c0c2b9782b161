"""The vectors of a base model, which tasks may train as they are: norms' weights and biases."""

from __future__ import annotations

import re
from functools import lru_cache

from lobra.layout.shapes import ModelShape
from lobra.model.checkpoint import needed_tensors


@lru_cache(maxsize=8)
def base_vectors(shape: ModelShape) -> dict[int, dict[str, int]]:
    """Return of every layer the size of each vector, by its name in the checkpoint.

    As transformers builds the model. The final norm is in the layer after the last.
    """
    assert shape.path is not None, "a model that is trained has a folder"
    found: dict[int, dict[str, int]] = {layer: {} for layer in shape.adapted_layers}
    for name, (size, *more) in needed_tensors(shape.path, shape).items():
        if not more:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            found[int(layer[1]) if layer else shape.num_layers][name] = size
    return found


def fits(key: str, name: str) -> bool:
    """Return whether a key of PEFT's `modules_to_save` means the norm whose weight has this name.

    PEFT asks whether the path ends with it; no other module's path ends as those of norms do.
    """
    return name.endswith(f"{key}.weight")
