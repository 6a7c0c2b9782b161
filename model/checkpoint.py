"""Lazy reading of a Hugging Face checkpoint: each rank reads only the slices it needs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lobra.common.documents import check_regular, read_json
from lobra.common.errors import ConfigError, Problems
from lobra.layout.shapes import ModelShape
from lobra.model.quantised_checkpoint import Header, as_unquantised, quantised_weight_of

WHOLE = slice(None)
INDEX = "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS, FIRST_LAYER = "model.layers.", "model.layers.0."
BEYOND = "a layer beyond the last"
#: Constants that older versions of transformers saved; they are computed from config.json.
BUFFERS = (".inv_freq", ".cos_cached", ".sin_cached", ".masked_bias")
ROWS_AT_A_TIME = 4096  # of an embedding: some tens of megabytes
#: Of a model whose values are looked at before a run: a second's reading. Ranks look at all of it.
SAMPLED_BYTES = 256 << 20
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors names them
LARGEST_EPSILON = 0.01  # of norms: models have 1e-5 or less


def tensor_files(folder: Path) -> dict[str, str]:
    """Return {tensor name: file name} of a model folder with one or several safetensors files.

    Raises
    ------
    ConfigError
        There are none, the index or a file is damaged, or a file is missing.
    """
    index = folder / INDEX
    if index.is_file():
        document = read_json(index)
        files = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(files, dict) or not all(map(_is_file_name, files.values())):
            raise ConfigError(
                f"{index}: weight_map: want an object with the file of every tensor, which lies "
                f"beside it"
            )
        missing = sorted({name for name in files.values() if not (folder / name).is_file()})
        if missing:
            raise ConfigError(
                [f"{folder / name}: named in {INDEX} but missing" for name in missing]
            )
        return files
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened(path) as file:
            files.update(dict.fromkeys(file.keys(), path.name))
    if not files:
        raise ConfigError(f"{folder}: no safetensors weights found")
    return files


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def opened(path: Path) -> Any:
    """Return the opened safetensors file.

    Raises
    ------
    ConfigError
        The file is damaged or cut short.
    """
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a usable safetensors file ({error})") from error


def checkpoint_problems(folder: Path, shape: ModelShape) -> Problems:
    """Return what is wrong with a model folder's weights (empty: nothing).

    Every tensor the model needs is there, and none is there that would change the model if it were
    used: a layer's bias that config.json switches off, a layer beyond the last, another head. Reads
    the files' headers; tensors only where a head must be compared with the embedding.
    """
    try:
        files = tensor_files(folder)
        headers: dict[str, Header] = {}
        for name in sorted(set(files.values())):
            with opened(folder / name) as file:
                for key in list(file.keys()):
                    part = file.get_slice(key)
                    headers[key] = tuple(part.get_shape()), part.get_dtype()
        read = partial(_tensor, folder, files)
        headers = as_unquantised(headers, shape.quantised, folder, read)
        expected = needed_tensors(folder, shape)
    except ConfigError as error:
        return error.problems
    found = {name: size for name, (size, _) in headers.items()}
    problems = Problems()
    for name, wanted in expected.items():
        if name not in found:
            problems.add(f"{folder}: the checkpoint has no tensor {name!r}")
        elif found[name] != wanted:
            problems.add(
                f"{folder}: tensor {name!r} is {found[name]}, config.json implies {wanted}"
            )
    problems += [
        f"{folder}: tensor {name!r} is stored as {dtype}; quantised weights are not read, use the "
        f"unquantised model"
        for name, (_, dtype) in headers.items()
        if name.endswith((".weight", ".bias")) and dtype not in PLAIN_DTYPES
    ]
    problems += [f"{folder}: {text}" for text in _unused_tensors(found.keys() - expected, shape)]
    both = shape.tied_embeddings and {HEAD, EMBEDDING} <= found.keys()
    if both and not problems and not _equal_tensors(folder, files, HEAD, EMBEDDING):
        problems.add(
            f"{folder}: {HEAD!r} differs from {EMBEDDING!r}, but config.json ties them "
            f"(tie_word_embeddings): say false there if the head is one of its own"
        )
    if not problems:
        problems += [_not_finite(folder, name) for name in _spoilt(folder, files, expected)]
    return problems


def _tensor(folder: Path, files: Mapping[str, str], name: str) -> Tensor:
    with opened(folder / files[name]) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _not_finite(folder: Path, name: str) -> str:
    return (
        f"{folder}: tensor {name!r} holds values that are not finite, so every loss would be none; "
        f"get the model's weights anew"
    )


def _spoilt(
    folder: Path, files: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yield the tensors with a NaN or an infinity in their first rows; of a small model, in any."""
    share = SAMPLED_BYTES // max(1, len(shapes))
    for name, shape in shapes.items():
        row_bytes = 4 * math.prod(shape[1:])
        with opened(folder / files[name]) as file:
            if not bool(torch.isfinite(file.get_slice(name)[: 1 + share // row_bytes]).all()):
                yield name


def needed_tensors(folder: Path, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors of the model that config.json describes.

    As transformers builds it, so with the biases and norms its family has and config.json asks for.

    Raises
    ------
    ConfigError
        Transformers builds no model from it, or one that computes no numbers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.num_hidden_layers = 1  # all layers have the same tensors
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        problems = [*_number_problems(model, config)]
    except Exception as error:  # of whatever kind: its message says what it did not like
        raise ConfigError(
            f"{folder / 'config.json'}: transformers builds no model from it: {error}"
        ) from error
    Problems(f"{folder / 'config.json'}: {problem}" for problem in problems).raise_if_any()
    needed = {}
    for name, parameter in model.named_parameters():
        copies = range(shape.num_layers) if name.startswith(FIRST_LAYER) else range(1)
        for layer in copies:
            copy = name.replace(FIRST_LAYER, f"{LAYERS}{layer}.", 1)
            needed[copy] = tuple(parameter.shape)
    if shape.tied_embeddings:
        needed.pop(HEAD, None)
    return needed


def _number_problems(model: Any, config: Any) -> Iterator[str]:
    """Yield why a model computes no finite numbers, whatever its weights."""
    epsilons = {
        getattr(module, "variance_epsilon", getattr(module, "eps", 0.0))
        for module in model.modules()
    }
    for epsilon in epsilons:
        if not 0 <= epsilon <= LARGEST_EPSILON:
            text = f"want a number from 0 to {LARGEST_EPSILON}"
            yield f"what norms add to the mean square (rms_norm_eps) is {epsilon}: {text}"
    rotary = getattr(model.model, "rotary_emb", None)
    for _, frequencies in type(rotary)(config).named_buffers() if rotary is not None else ():
        if not bool(((frequencies > 0) & frequencies.isfinite()).all()):
            yield "rope_parameters give frequencies that are not positive numbers: correct them"
            return


def _unused_tensors(names: Iterable[str], shape: ModelShape) -> list[str]:
    """Return a problem for each kind of tensors that would change the model if it were used."""
    kinds: dict[str, list[int]] = {}  # without the layer's number: the layers
    for name in names:
        if not name.startswith(("model.", "lm_head.")) or name.endswith(BUFFERS):
            continue
        if name == HEAD and shape.tied_embeddings:
            continue
        kind, layer = name, -1
        if match := re.fullmatch(rf"{re.escape(LAYERS)}(\d+)\.(.*)", name):
            layer = int(match[1])
            kind = match[2] if layer < shape.num_layers else BEYOND
        kinds.setdefault(kind, []).append(layer)
    problems = []
    for kind, layers in sorted(kinds.items()):
        if kind == BEYOND:
            problems.append(
                f"the checkpoint has layers up to '{LAYERS}{max(layers)}', config.json says "
                f"num_hidden_layers {shape.num_layers} (0 to {shape.num_layers - 1}): correct one"
            )
            continue
        where = f"{LAYERS}{min(layers)}.{kind}" if layers[0] >= 0 else kind
        more = f" (and {len(layers) - 1} more like it)" if len(layers) > 1 else ""
        problems.append(
            f"the checkpoint has {where!r}{more}, which the model that config.json describes does "
            f"not use: {_remedy(kind)}"
        )
    return problems


def _remedy(kind: str) -> str:
    """Return what to do about an unused tensor of this name within its layer."""
    for parent, option in (("self_attn.", "attention_bias"), ("mlp.", "mlp_bias")):
        if kind.startswith(parent) and kind.endswith(".bias"):
            return (
                f"set {option} in config.json if its model type has it, or use another model type"
            )
    return "correct config.json, or remove the tensor"


def _equal_tensors(folder: Path, files: Mapping[str, str], first: str, second: str) -> bool:
    """Whether two tensors of a folder hold the same, comparing a few rows at a time."""
    with opened(folder / files[first]) as one, opened(folder / files[second]) as other:
        return equal_slices(one.get_slice(first), other.get_slice(second))


def equal_slices(left: Any, right: Any) -> bool:
    """Return whether two tensors of safetensors files hold the same, in the first one's dtype."""
    if left.get_shape() != right.get_shape():
        return False
    for start in range(0, left.get_shape()[0], ROWS_AT_A_TIME):
        rows = left[start : start + ROWS_AT_A_TIME]
        if not torch.equal(rows, right[start : start + ROWS_AT_A_TIME].to(rows.dtype)):
            return False
    return True


@dataclass
class CheckpointReader:
    """Opens the safetensors files of a model folder on demand and reads slices of tensors.

    `loaded_bytes` counts what was read, so that a test can hold a rank to its own share.
    """

    folder: Path
    dtype: torch.dtype
    device: torch.device
    loaded_bytes: int = 0
    _files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._files = tensor_files(self.folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @cached_property
    def is_quantised(self) -> bool:
        """Whether linears are there in eight or four bits."""
        return any(map(quantised_weight_of, self._files))

    def stored(self, name: str) -> Tensor:
        """Return a whole tensor on this reader's device, in the dtype that it is stored in."""
        return self._part(name, WHOLE, None, None)

    def read(self, name: str, rows: slice = WHOLE, columns: slice | None = None) -> Tensor:
        """Return `tensor[rows]` or `tensor[rows, columns]` in this reader's dtype and device.

        Raises
        ------
        ConfigError
            The checkpoint has no such tensor, or its file is damaged.
        """
        return self._part(name, rows, columns, self.dtype)

    def _part(
        self, name: str, rows: slice, columns: slice | None, dtype: torch.dtype | None
    ) -> Tensor:
        if name not in self._files:
            raise ConfigError(f"{self.folder}: the checkpoint has no tensor {name!r}")
        # Opened for this tensor only: the pages of a file that stays mapped would add up to much
        # more than this rank's share.
        with opened(self.folder / self._files[name]) as file:
            lazy = file.get_slice(name)
            part: Tensor = lazy[rows] if columns is None else lazy[rows, columns]
            # A slice may be a view into the file's map; own exactly our share.
            tensor = part.to(dtype=dtype, device=self.device, copy=True)
        if not bool(torch.isfinite(tensor).all()):
            raise ConfigError(_not_finite(self.folder, name))
        self.loaded_bytes += tensor.numel() * part.element_size()
        return tensor


def as_slice(part: range) -> slice:
    """Return a contiguous range as a slice."""
    return slice(part.start, part.stop)
