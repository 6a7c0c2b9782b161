"""Where a base model's weights are; imports nothing heavy until the tiny model is built."""

from __future__ import annotations

import os
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.layout.shapes import MODELS_DIR, TINY, resolve_shape, similar_model


def tokenizer_folder(model: str) -> Path:
    """Return the folder with a model's tokenizer, which needs no weights beside it.

    Raises
    ------
    ConfigError
        There is no such folder.
    """
    for folder in (Path(model), MODELS_DIR / model):
        if os.path.isfile(folder / "tokenizer.json"):
            return folder
    resolve_shape(model)  # says which names there are
    return resolve_folder(model)


def resolve_folder(model: str) -> Path:
    """Return the folder that holds the base model's weights; `tiny` is built on first use.

    Raises
    ------
    ConfigError
        There is no such folder, or it holds no safetensors file.
    """
    for folder in (Path(model), MODELS_DIR / model):
        if os.path.isfile(folder / "config.json"):
            if not any(folder.glob("*.safetensors")):
                raise ConfigError(
                    f"{folder}: no *.safetensors file; only safetensors weights are read "
                    f"(convert with transformers' save_pretrained)"
                )
            return folder
    if model == TINY:
        from lobra.model.tiny import build_tiny  # imports transformers

        return build_tiny(MODELS_DIR / TINY)
    raise ConfigError(
        f"model {model!r}{similar_model(model)}: no folder with its weights at {Path(model)} or "
        f"{MODELS_DIR / model}; download a Hugging Face model folder and give its path or link it "
        f"there"
    )
