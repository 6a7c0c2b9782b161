"""Model shapes: the few numbers of a base model that everything else is computed from.

Torch-free, so that planning never pays for importing torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict

from lobra.common.documents import read_json
from lobra.common.errors import ConfigError, Problems, did_you_mean
from lobra.common.models import AtMost, FileModel, Flag, OneOf, PositiveInt, read_as
from lobra.layout.base_precision import block_problems, stored_precision
from lobra.layout.world import adapted_layers
from lobra.tasks.target_modules import EMBEDDING, HEAD

TINY = "tiny"
MODELS_DIR = Path("models")

SUPPORTED_MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2"),
    *("phi3", "glm", "glm4"),
)
# What transformers' configuration classes assume where a config.json is silent; elsewhere the head
# size follows from the hidden size, and the head is not tied to the embedding.
DEFAULT_HEAD_DIM = {
    "qwen3": 128,
    "gemma": 256,
    "gemma2": 256,
    "gemma3_text": 256,
    "glm": 128,
    "glm4": 128,
}
DEFAULT_TIED = {"gemma": True, "gemma2": True, "gemma3_text": True}
NORMS_BEHIND = ("gemma2", "gemma3_text", "olmo2", "glm4")
FUSED = {"phi3": ("qkv_proj", "gate_up_proj"), "glm": ("gate_up_proj",), "glm4": ("gate_up_proj",)}


@dataclass(frozen=True)
class FusedLinear:
    """A linear that computes several projections, whose features lie one part after the other.

    Split over GPUs it is by groups: each has the features of a group of heads, or of one neuron,
    of every part. Here its features lie group by group, so that what a GPU has of them lies
    together; in checkpoints and in PEFT's adapters they lie part by part.

    Attributes
    ----------
    parts
        The projections' names.
    groups
        How many there are.
    widths
        Features of a group, of each part.
    """

    parts: tuple[str, ...]
    groups: int
    widths: tuple[int, ...]

    @property
    def group_width(self) -> int:
        """Features of a group, of all parts."""
        return sum(self.widths)

    @property
    def out_features(self) -> int:
        """Features of all groups."""
        return self.groups * self.group_width

    def part_rows(self, features: range) -> list[range]:
        """Return where features of whole groups lie in a checkpoint: a range of each part."""
        groups = range(features.start // self.group_width, features.stop // self.group_width)
        offsets = accumulate((self.groups * width for width in self.widths), initial=0)
        return [
            range(offset + groups.start * width, offset + groups.stop * width)
            for offset, width in zip(offsets, self.widths, strict=False)
        ]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer. `path` is None for a shape known only by name.

    `max_positions` is the longest context the model was made for, None where nothing says it.
    `norms_behind`: a norm follows the last product of a layer. `fused`: names of linears that are
    several projections in one. `quantised`: what weights of linears are kept in, one of
    `base_precision.QUANTISED`; None: in what all else is.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool = False
    path: Path | None = None
    max_positions: int | None = None
    norms_behind: bool = False
    fused: tuple[str, ...] = ()
    quantised: str | None = None

    @property
    def adapted_layers(self) -> range:
        """All that adapters may be on: embedding, layers, final norm and head."""
        return adapted_layers(range(self.num_layers), self.num_layers)

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Return {module name: (in_features, out_features)} of one decoder layer's linears."""
        hidden, ffn = self.hidden_size, self.intermediate_size
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {
            "q_proj": (hidden, query),
            "k_proj": (hidden, key),
            "v_proj": (hidden, key),
            "o_proj": (query, hidden),
            "gate_proj": (hidden, ffn),
            "up_proj": (hidden, ffn),
            "down_proj": (ffn, hidden),
        }
        for name, fused in self.fused_linears().items():
            sizes[name] = hidden, fused.out_features
            for part in fused.parts:
                del sizes[part]
        return sizes

    def fused_linears(self) -> dict[str, FusedLinear]:
        """Return what the model's fused linears are made of, by their names."""
        heads = self.num_heads // self.num_kv_heads, 1, 1
        known = {
            "qkv_proj": FusedLinear(
                ("q_proj", "k_proj", "v_proj"),
                self.num_kv_heads,
                tuple(number * self.head_dim for number in heads),
            ),
            "gate_up_proj": FusedLinear(("gate_proj", "up_proj"), self.intermediate_size, (1, 1)),
        }
        return {name: known[name] for name in self.fused}

    def module_sizes(self) -> dict[str, tuple[int, int]]:
        """Return the sizes of all that adapters may be on: linears, embedding and head."""
        vocabulary = {
            EMBEDDING: (self.vocab_size, self.hidden_size),
            HEAD: (self.hidden_size, self.vocab_size),
        }
        return {**self.linear_sizes(), **vocabulary}

    def kept_in(self, base_precision: str | None) -> ModelShape:
        """Return the shape with its linears kept in a base precision, None: as its folder has them.

        Raises
        ------
        ConfigError
            If its folder has them quantised otherwise.
        """
        if base_precision in (None, self.quantised):
            return self
        if self.quantised is not None:
            raise ConfigError(
                f"--base-precision {base_precision}: the weights of {self.name} are there in "
                f"{self.quantised} only: leave it out, or use the unquantised model"
            )
        return replace(self, quantised=None if base_precision == "bf16" else base_precision)

    def own_modules(self, target_modules: Iterable[str]) -> tuple[str, ...]:
        """Return the model's own modules that target modules mean; a fused linear if all parts do.

        Raises
        ------
        ConfigError
            It has none of a name, or only some parts of a fused linear are targets.
        """
        targets, sizes = set(target_modules), self.module_sizes()
        problems = []
        for name, fused in self.fused_linears().items():
            given = [part for part in fused.parts if part in targets]
            if len(given) == len(fused.parts):
                targets.add(name)
            elif given:
                problems.append(
                    f"{' and '.join(given)} alone cannot be adapted: in {self.name} "
                    f"{', '.join(fused.parts)} are one linear, {name}; target all of them or none"
                )
            targets -= set(fused.parts)
        problems += [
            f"target module {module!r} is not one of {', '.join(sizes)}"
            for module in sorted(targets - sizes.keys())
        ]
        if problems:
            raise ConfigError(problems)
        return tuple(module for module in sizes if module in targets)

    def layer_modules(self, target_modules: Iterable[str]) -> tuple[str, ...]:
        """Return the linears of a layer that target modules mean, as `own_modules` does."""
        return tuple(m for m in self.own_modules(target_modules) if m in self.linear_sizes())

    def adapter_elements(
        self, rank: int, target_modules: tuple[str, ...], layers: range | None = None
    ) -> int:
        """Return the number of LoRA parameters of one adapter.

        Parameters
        ----------
        rank
            LoRA's r.
        target_modules
            The modules it is on.
        layers
            Only of these `adapted_layers`; None: all.
        """
        layers = self.adapted_layers if layers is None else layers
        own_place = {EMBEDDING: range(-1, 0), HEAD: range(self.num_layers, self.num_layers + 1)}
        sizes, total = self.module_sizes(), 0
        for module in self.own_modules(target_modules):
            places = own_place.get(module, range(self.num_layers))
            total += rank * sum(sizes[module]) * sum(layer in layers for layer in places)
        return total


ATTENTION_MODULES = ("qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj")


def module_path(module: str) -> str:
    """Return where a linear sits in its decoder layer, such as `self_attn.q_proj`."""
    return f"{'self_attn' if module in ATTENTION_MODULES else 'mlp'}.{module}"


# Layers, hidden, ffn and heads as LobRA publishes them (its model configurations); 70B with
# Llama-2-70B's 8 key/value heads, the others with as many as query heads.
NAMED_SHAPES = {
    "7B": ModelShape("7B", 32, 4096, 11008, 32, 32, 128, 32000),
    "13B": ModelShape("13B", 40, 5120, 13824, 40, 40, 128, 32000),
    "32B": ModelShape("32B", 60, 6656, 17920, 64, 64, 104, 32000),
    "70B": ModelShape("70B", 80, 8192, 28672, 64, 8, 128, 32000),
    TINY: ModelShape(TINY, 4, 128, 352, 4, 2, 32, 2048),
}


def resolve_shape(model: str) -> ModelShape:
    """Return the shape of `tiny`, `7B`, `13B`, `32B`, `70B` or of a Hugging Face model folder.

    A folder `models/<name>` takes precedence over the built-in sizes of that name.

    Raises
    ------
    ConfigError
        The name is unknown and no such folder exists, or config.json is unusable.
    """
    for folder in (Path(model), MODELS_DIR / model):
        if os.path.isfile(folder / "config.json"):
            return read_shape(folder)
    if model in NAMED_SHAPES:
        return NAMED_SHAPES[model]
    raise ConfigError(
        f"model {model!r}{similar_model(model)}: neither one of {', '.join(NAMED_SHAPES)} nor a "
        f"folder with a config.json; give the path of a Hugging Face model folder"
    )


def similar_model(model: str) -> str:
    """Return which model may be meant by a name that is none: a built-in one, or a folder's."""
    if model in NAMED_SHAPES:
        return ""
    beside = Path(model).parent
    places = [MODELS_DIR, *([beside] if beside.is_dir() else [])]
    folders = [file.parent for place in places for file in place.glob("*/config.json")]
    return did_you_mean(model, [*NAMED_SHAPES, *(f.name for f in folders), *map(str, folders)])


_Size = Annotated[PositiveInt, AtMost(2**24)]


@dataclass(frozen=True)
class ModelConfig(FileModel):
    """What is read of a model's `config.json` here; all else there is transformers' business."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    model_type: Annotated[str, OneOf(SUPPORTED_MODEL_TYPES)]
    num_hidden_layers: Annotated[PositiveInt, AtMost(1024)]
    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Size
    vocab_size: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    tie_word_embeddings: Flag | None = None
    max_position_embeddings: PositiveInt | None = None

    @property
    def heads_problem(self) -> str | None:
        """Why the heads cannot be shared out, None if they can."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads and heads % kv_heads:
            return f"num_key_value_heads = {kv_heads}: want a divisor of the {heads} heads"
        family_has = self.head_dim or DEFAULT_HEAD_DIM.get(self.model_type)
        if not family_has and self.hidden_size % heads:
            return (
                f"num_attention_heads = {heads}: want a divisor of hidden_size, "
                f"{self.hidden_size}, or a head_dim"
            )
        return None


def read_shape(folder: Path) -> ModelShape:
    """Read the shape from a Hugging Face `config.json`.

    Raises
    ------
    ConfigError
        With every mistake of the file.
    """
    path = folder / "config.json"
    document = read_json(path)
    problems, quantised = Problems(), None
    config = read_as(ModelConfig, document, problems)
    if config is not None and config.heads_problem:
        problems.add(config.heads_problem)
    if isinstance(document, dict):
        with problems.noted():
            quantised = stored_precision(document.get("quantization_config"))
        if document.get("use_bidirectional_attention"):
            problems.add(
                "use_bidirectional_attention: tokens that see later ones are not supported; use a "
                "causal model"
            )
        problems += _rope_problems(document)
    problems.prefixed(f"{path}: ").raise_if_any()
    assert config is not None
    heads, hidden = config.num_attention_heads, config.hidden_size
    is_tied = config.tie_word_embeddings
    return ModelShape(
        name=folder.name,
        num_layers=config.num_hidden_layers,
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=config.head_dim or DEFAULT_HEAD_DIM.get(config.model_type) or hidden // heads,
        vocab_size=config.vocab_size,
        tied_embeddings=(
            DEFAULT_TIED.get(config.model_type, False) if is_tied is None else is_tied
        ),
        path=folder,
        max_positions=config.max_position_embeddings,
        norms_behind=config.model_type in NORMS_BEHIND,
        fused=FUSED.get(config.model_type, ()),
        quantised=quantised,
    )


def _rope_problems(config: dict[str, Any]) -> list[str]:
    """Return a problem for rotary embeddings of which a sequence's result is no function alone.

    `dynamic` is plain up to max_position_embeddings; beyond, it depends on the longest sequence
    that has been seen. `longrope` goes by each sequence's own length here (`model.long_rope`), but
    not in families with embeddings of their own for each kind of layer.
    """
    problems = []
    for field in ("rope_parameters", "rope_scaling"):
        given = config.get(field)
        if not isinstance(given, dict):
            continue
        of_kinds = [value for value in given.values() if isinstance(value, dict)]
        for entry in (given, *of_kinds):
            kind = entry.get("rope_type", entry.get("type"))
            if kind == "dynamic":
                limit = config.get("max_position_embeddings", "the max_position_embeddings")
                problems.append(
                    f"{field}: the rope type 'dynamic' makes a sequence depend on the longest one "
                    f"in its batch and is not supported; up to {limit} tokens it does nothing: "
                    f"with every context_length within that, say 'default' instead in a copy of "
                    f"the model folder; for longer ones use another model"
                )
            elif kind == "longrope" and entry is not given:
                problems.append(
                    f"{field}: the rope type 'longrope' of one kind of layers makes a sequence "
                    f"depend on the longest one in its batch and is not supported; use another "
                    f"model"
                )
    return problems


def layout_problem(shape: ModelShape, tp: int, pp: int) -> str | None:
    """Return why the layout <tp,pp> cannot run this model, or None when it can.

    Tensor parallelism needs tp to divide the heads and the ffn size, and the key/value heads to
    divide tp or be divided by it; every pipeline stage needs at least one layer, and nf4 whole
    blocks in a row.
    """
    if tp < 1 or pp < 1:
        return f"<{tp},{pp}>: tp and pp must be at least 1"
    reasons = []
    if shape.num_heads % tp:
        reasons.append(f"tp {tp} does not divide the {shape.num_heads} attention heads")
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        reasons.append(f"tp {tp} and the {shape.num_kv_heads} key/value heads do not divide")
    if "qkv_proj" in shape.fused and shape.num_kv_heads % tp:
        reasons.append(
            f"tp {tp} does not divide the {shape.num_kv_heads} key/value heads, whose linear is "
            f"one with the queries'"
        )
    if shape.intermediate_size % tp:
        reasons.append(f"tp {tp} does not divide the ffn size {shape.intermediate_size}")
    if pp > shape.num_layers:
        reasons.append(f"pp {pp} is more than the {shape.num_layers} layers")
    if shape.quantised == "nf4":
        reasons += block_problems(shape.linear_sizes(), shape.fused, tp)
    return f"<{tp},{pp}>: {', '.join(reasons)}" if reasons else None
