"""Who holds what: replicas, pipeline stages, layers and tensor-parallel shards (torch-free).

A *grid* is one replica's ranks: `grid[stage][tp_index]` is a global rank. A plan placed on a
cluster is a tuple of grids. Everything here is pure arithmetic on them, so any world size can be
checked without starting a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Grid = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RankRole:
    """What one rank does: which replica, stage and tensor-parallel shard it is."""

    rank: int
    replica: int
    stage: int
    num_stages: int
    tp_index: int
    tp_size: int

    @property
    def is_first_stage(self) -> bool:
        """Return whether this rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank computes the loss."""
        return self.stage == self.num_stages - 1


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Return the decoder layers of a stage: contiguous, sizes differing by at most one.

    The longer stages come first, since the last stage also computes the head.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_stages} stages for {num_layers} layers")
    size, extra = divmod(num_layers, num_stages)
    start = stage * size + min(stage, extra)
    return range(start, start + size + (stage < extra))


def shard_range(size: int, num_shards: int, index: int) -> range:
    """Return the contiguous slice `index` of `size` elements (sizes differ by at most one)."""
    base, extra = divmod(size, num_shards)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))


def kv_head_range(num_kv_heads: int, tp_size: int, tp_index: int) -> range:
    """Return the key/value heads of a shard; heads are shared when tp exceeds their number."""
    if tp_size <= num_kv_heads:
        return shard_range(num_kv_heads, tp_size, tp_index)
    head = tp_index * num_kv_heads // tp_size
    return range(head, head + 1)


def role_of(grids: Sequence[Grid], rank: int) -> RankRole:
    """Return the role of `rank` in a placed plan.

    Raises:
        ValueError: the rank is in no replica.
    """
    for replica, grid in enumerate(grids):
        for stage, ranks in enumerate(grid):
            if rank in ranks:
                return RankRole(rank, replica, stage, len(grid), ranks.index(rank), len(ranks))
    raise ValueError(f"rank {rank} is in no replica of the plan")


@dataclass(frozen=True)
class LayerBlock:
    """Consecutive layers whose adapters are held by exactly the same ranks."""

    layers: range
    holders: tuple[int, ...]


def layer_blocks(grids: Sequence[Grid], num_layers: int) -> tuple[LayerBlock, ...]:
    """Split the layers into maximal blocks of consecutive layers with the same holders.

    The gradient of an adapter is the sum over its block's holders (DESIGN.md, "Training").
    """
    holders_of_layer: list[tuple[int, ...]] = []
    for layer in range(num_layers):
        holders: list[int] = []
        for grid in grids:
            for stage, ranks in enumerate(grid):
                if layer in stage_layers(num_layers, len(grid), stage):
                    holders.extend(ranks)
        holders_of_layer.append(tuple(sorted(holders)))
    blocks = []
    start = 0
    for layer in range(1, num_layers + 1):
        if layer == num_layers or holders_of_layer[layer] != holders_of_layer[start]:
            blocks.append(LayerBlock(range(start, layer), holders_of_layer[start]))
            start = layer
    return tuple(blocks)


def check_grids(grids: Sequence[Grid], world_size: int) -> None:
    """Check that every rank of the world is used exactly once.

    Raises:
        ValueError: a rank is missing, out of range, used twice, or a grid is not rectangular.
    """
    ranks = [rank for grid in grids for stage in grid for rank in stage]
    if sorted(ranks) != list(range(world_size)):
        raise ValueError(f"the plan places ranks {sorted(ranks)}, the world has {world_size}")
    for grid in grids:
        if len({len(stage) for stage in grid}) != 1:
            raise ValueError(f"replica {grid} mixes tensor-parallel degrees")
