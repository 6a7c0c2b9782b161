"""Which of a model's tensors a rank holds, and what part of each: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lobra.layout.shapes import FusedLinear, ModelShape
from lobra.layout.world import Place, shard_range
from lobra.model.base_linear import Shard
from lobra.model.checkpoint import EMBEDDING, HEAD, LAYERS, as_slice
from lobra.model.sharded_layer import ROW_PARALLEL, linear_shards

Size = tuple[int, ...]
#: Norms that may be over all heads' features together, and so be split as these linears are.
WIDE_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}


@dataclass(frozen=True)
class HeldTensor:
    """A rank's part of a tensor.

    Attributes
    ----------
    name
        In a checkpoint.
    size
        Of the whole.
    parts
        Of each of its axes what the rank holds, of a fused linear's as features lie here.
    is_shared
        Whether its tensor-parallel peers hold the same.
    fused
        What it is made of where it is the weight of a fused linear.
    """

    name: str
    size: Size
    parts: tuple[slice, ...]
    is_shared: bool
    fused: FusedLinear | None = None

    @property
    def stored_rows(self) -> list[range]:
        """Where a checkpoint has its rows, a fused linear's part by part."""
        rows = range(self.parts[0].start, self.parts[0].stop)
        return [rows] if self.fused is None else self.fused.part_rows(rows)

    @property
    def held_size(self) -> Size:
        """The part's."""
        return tuple(part.stop - part.start for part in self.parts)

    @property
    def numel(self) -> int:
        """Elements of the part."""
        return math.prod(self.held_size)

    @property
    def decays(self) -> bool:
        """Whether weight decay is applied to it: not to biases and norms, as in transformers."""
        return not self.name.endswith(".bias") and "norm" not in self.name

    @property
    def has_partial_gradient(self) -> bool:
        """Whether it is shared, but each rank has only its own features' part of the gradient."""
        owner, _, kind = self.name.rpartition(".")
        is_inside = ".self_attn." in self.name or ".mlp." in self.name
        is_behind = kind == "bias" and owner.rpartition(".")[2] in ROW_PARALLEL
        return self.is_shared and is_inside and not is_behind


def held_tensors(
    sizes: Mapping[str, Size], shape: ModelShape, place: Place
) -> tuple[HeldTensor, ...]:
    """Return what a rank holds of a model's tensors.

    Parameters
    ----------
    sizes
        Of all tensors by their names, an embedding that is the head too as an embedding.
    shape
        The model's.
    place
        The rank's.
    """
    return tuple(_held(sizes, shape, place))


def owned_tensors(held: Sequence[HeldTensor], place: Place) -> list[HeldTensor]:
    """Return those that the rank keeps the optimiser's state of, decayed ones first.

    Of what a tensor-parallel group shares that is its first rank.
    """
    own = [tensor for tensor in held if not tensor.is_shared or place.tp_index == 0]
    return sorted(own, key=lambda tensor: not tensor.decays)


def _held(sizes: Mapping[str, Size], shape: ModelShape, place: Place) -> Iterator[HeldTensor]:
    shards = linear_shards(shape, place.layout.tp, place.tp_index)
    layers, all_fused = place.layers(shape.num_layers), shape.fused_linears()
    for name, size in sizes.items():
        if name.startswith(LAYERS):
            is_here = int(name.removeprefix(LAYERS).partition(".")[0]) in layers
        else:
            is_here = place.is_first_stage if name == EMBEDDING else place.is_last_stage
        if is_here:
            whole = tuple(slice(0, length) for length in size)
            parts = _parts(name, whole, shards, place)
            fused = all_fused.get(name.split(".")[-2])
            yield HeldTensor(name, size, parts, place.layout.tp > 1 and parts == whole, fused)


def _parts(
    name: str, whole: tuple[slice, ...], shards: Mapping[str, Shard], place: Place
) -> tuple[slice, ...]:
    if name in (EMBEDDING, HEAD):
        rows = shard_range(whole[0].stop, place.layout.tp, place.tp_index)
        return as_slice(rows), *whole[1:]
    owner, _, kind = name.rpartition(".")
    module = owner.rpartition(".")[2]
    if module in shards:
        shard = shards[module]
        if kind == "weight":
            return as_slice(shard.outputs), as_slice(shard.inputs)
        return (as_slice(shard.outputs),)
    if WIDE_NORMS.get(module) in shards:
        shard = shards[WIDE_NORMS[module]]
        if whole == (slice(0, shard.out_features),):
            return (as_slice(shard.outputs),)
    return whole
