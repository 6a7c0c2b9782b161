"""A plan on its ranks: which rank is which shard of which stage of which replica, and its peers.

Pure arithmetic: a world of any size can be made and checked without starting a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise

from lobra.layout.layout import Layout

#: One replica's ranks: ``ranks[stage][tp_index]`` is a global rank.
ReplicaRanks = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Place:
    """Where a rank is: the replica, its layout, the stage and the tensor-parallel shard."""

    rank: int
    replica: int
    layout: Layout
    stage: int
    tp_index: int

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage == self.layout.pp - 1

    @property
    def owns_loss(self) -> bool:
        """Whether this rank's losses count: its tensor-parallel peers compute the same."""
        return self.is_last_stage and self.tp_index == 0

    def layers(self, num_layers: int) -> range:
        """Return the decoder layers of this rank's stage."""
        return stage_layers(num_layers, self.layout.pp, self.stage)

    def adapted_layers(self, num_layers: int) -> range:
        """Return the layers and what else of its stage adapters may be on."""
        return adapted_layers(self.layers(num_layers), num_layers)


@dataclass(frozen=True)
class LayerBlock:
    """Consecutive `adapted_layers` whose adapters are held by exactly the same ranks."""

    layers: range
    holders: tuple[int, ...]


@dataclass(frozen=True)
class World:
    """The ranks of every replica of a plan, in the plan's order.

    Attributes
    ----------
    layouts
        The layout of every replica.
    replicas
        ``replicas[r][stage][tp_index]`` is a global rank.

    Raises
    ------
    ValueError
        If a replica's ranks are not those of its layout, or not every rank is used exactly once.
    """

    layouts: tuple[Layout, ...]
    replicas: tuple[ReplicaRanks, ...]

    def __post_init__(self) -> None:
        if len(self.layouts) != len(self.replicas):
            raise ValueError(f"{len(self.replicas)} replicas for {len(self.layouts)} layouts")
        for layout, replica in zip(self.layouts, self.replicas, strict=True):
            if [len(stage) for stage in replica] != [layout.tp] * layout.pp:
                raise ValueError(f"the ranks {[list(s) for s in replica]} are no {layout}")
        ranks = sorted(rank for replica in self.replicas for stage in replica for rank in stage)
        if ranks != list(range(len(ranks))):
            raise ValueError(f"the ranks are {ranks}, want each from 0 on exactly once")

    @property
    def num_ranks(self) -> int:
        """How many ranks there are."""
        return len(self._places)

    @cached_property
    def _places(self) -> dict[int, Place]:
        return {
            rank: Place(rank, replica, layout, stage, tp_index)
            for replica, (layout, ranks) in enumerate(zip(self.layouts, self.replicas, strict=True))
            for stage, shards in enumerate(ranks)
            for tp_index, rank in enumerate(shards)
        }

    def place(self, rank: int) -> Place:
        """Return where a rank is.

        Raises
        ------
        ValueError
            If there is no such rank.
        """
        if rank not in self._places:
            raise ValueError(f"rank {rank} is in no replica of the plan")
        return self._places[rank]

    def as_lists(self) -> list[list[list[int]]]:
        """Return the ranks as a plan's file has them (``meta.ranks``)."""
        return [[list(stage) for stage in replica] for replica in self.replicas]

    def ranks(self, replica: int) -> tuple[int, ...]:
        """Return all ranks of a replica, stage by stage."""
        return tuple(rank for stage in self.replicas[replica] for rank in stage)

    def tp_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that share this rank's stage, by tensor-parallel index."""
        place = self.place(rank)
        return self.replicas[place.replica][place.stage]

    def pipe_ranks(self, rank: int) -> tuple[int, ...]:
        """Return the ranks with this rank's tensor-parallel index, by stage."""
        place = self.place(rank)
        return tuple(stage[place.tp_index] for stage in self.replicas[place.replica])

    def spread_groups(self, gpus_per_node: int | Sequence[int]) -> list[tuple[int, ...]]:
        """Return the tensor-parallel groups that a node could hold but that lie on several.

        ``gpus_per_node`` is of every node, or of each.
        """
        nodes = node_ranks(self.num_ranks, gpus_per_node)
        largest = max(map(len, nodes))
        node_of = {rank: index for index, node in enumerate(nodes) for rank in node}
        return [
            stage
            for replica in self.replicas
            for stage in replica
            if len(stage) <= largest and len({node_of.get(rank) for rank in stage}) > 1
        ]

    def blocks(self, num_layers: int) -> tuple[LayerBlock, ...]:
        """Return maximal blocks of consecutive `adapted_layers` with the same holders.

        The gradient of an adapter is the sum over its block's holders (docs/architecture.md).
        """
        holders: dict[int, list[int]] = {layer: [] for layer in range(-1, num_layers + 1)}
        for rank, place in sorted(self._places.items()):
            for layer in place.adapted_layers(num_layers):
                holders[layer].append(rank)
        blocks = []
        for ranks, same in groupby(holders, key=holders.__getitem__):
            layers = list(same)
            blocks.append(LayerBlock(range(layers[0], layers[-1] + 1), tuple(ranks)))
        return tuple(blocks)

    def shard_blocks(self, num_layers: int) -> tuple[LayerBlock, ...]:
        """Return the shards of each stage with the ranks that hold the same, of like replicas."""
        return tuple(
            LayerBlock(self.place(ranks[0]).layers(num_layers), tuple(sorted(ranks)))
            for stages in zip(*self.replicas, strict=True)
            for ranks in zip(*stages, strict=True)
        )


def node_ranks(num_ranks: int, gpus_per_node: int | Sequence[int]) -> list[range]:
    """Return the ranks of each node, numbered node by node; ``gpus_per_node`` is of all or of each.

    The last node may have fewer ranks than it could.
    """
    if isinstance(gpus_per_node, int):
        gpus_per_node = [gpus_per_node] * -(-num_ranks // gpus_per_node)
    ends = [min(end, num_ranks) for end in accumulate(gpus_per_node)]
    return [range(start, end) for start, end in pairwise([0, *ends])]


def one_replica(layout: Layout) -> World:
    """Return the world of a single replica, its ranks in order."""
    return consecutive([layout])


def consecutive(layouts: Sequence[Layout]) -> World:
    """Return the world of replicas one after another, each rank by rank."""
    replicas = []
    next_rank = 0
    for layout in layouts:
        starts = range(next_rank, next_rank + layout.num_gpus, layout.tp)
        replicas.append(tuple(tuple(range(start, start + layout.tp)) for start in starts))
        next_rank += layout.num_gpus
    return World(tuple(layouts), tuple(replicas))


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Return the decoder layers of a stage: contiguous, sizes differing by at most one.

    The longer stages come first, since the last stage also computes the head.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(f"{num_stages} stages for {num_layers} layers")
    return shard_range(num_layers, num_stages, stage)


def adapted_layers(layers: range, num_layers: int) -> range:
    """Return a stage's layers and what else of the stage adapters may be on.

    The embedding counts as layer -1, the final norm and the head as the one after the last.
    """
    return range(layers.start - (layers.start == 0), layers.stop + (layers.stop == num_layers))


def shard_range(size: int, num_shards: int, index: int) -> range:
    """Return the contiguous slice ``index`` of ``size`` elements (sizes differ by at most one)."""
    base, extra = divmod(size, num_shards)
    start = index * base + min(index, extra)
    return range(start, start + base + (index < extra))


def kv_head_range(num_kv_heads: int, tp_size: int, tp_index: int) -> range:
    """Return the key/value heads of a shard; heads are shared when tp exceeds their number."""
    if tp_size <= num_kv_heads:
        return shard_range(num_kv_heads, tp_size, tp_index)
    head = tp_index * num_kv_heads // tp_size
    return range(head, head + 1)
