"""Placement: a plan put on the ranks of nodes, tensor-parallel groups inside a node."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from lobra.common.errors import ConfigError
from lobra.layout.plan import Plan
from lobra.layout.world import World, node_ranks

log = logging.getLogger(__name__)


def place(plan: Plan, gpus_per_node: int | Sequence[int]) -> World:
    """Return the plan on its ranks.

    Ranks 0 .. ``plan.num_gpus`` - 1 are numbered node by node. A tensor-parallel group lies inside
    one node; one larger than any node takes whole nodes of the largest size. Large groups are
    placed first, and the stages of a replica one after another, so that neighbours in the pipeline
    are near each other.

    Parameters
    ----------
    plan
        What is to be placed.
    gpus_per_node
        Of every node, or of each.

    Raises
    ------
    ConfigError
        If a node has no GPU, or the groups cannot be packed into the nodes.
    """
    if isinstance(gpus_per_node, int) and gpus_per_node < 1:
        raise ConfigError(f"gpus per node: {gpus_per_node}; a node has at least one")
    num_gpus = plan.num_gpus
    free = [list(node) for node in node_ranks(num_gpus, gpus_per_node)]
    largest = max(map(len, free))
    stages = [
        (replica.layout.tp, replica.index, stage)
        for replica in plan.replicas
        for stage in range(replica.layout.pp)
    ]
    stages.sort(key=lambda item: (-item[0], item[1], item[2]))
    sizes = [tp for tp, _, _ in stages]
    ranks: dict[tuple[int, int], tuple[int, ...]] = {}
    for tp, replica_index, stage in stages:
        if tp > largest:
            ranks[replica_index, stage] = _take_nodes(free, tp, largest, plan)
    small = [item for item in stages if item[0] <= largest]
    chosen = pack([tp for tp, _, _ in small], [len(node) for node in free])
    if chosen is None:
        of_each = gpus_per_node if isinstance(gpus_per_node, int) else [*gpus_per_node]
        raise ConfigError(
            f"plan {plan}: its tensor-parallel groups {sizes} cannot be packed into nodes of "
            f"{of_each} GPUs ({num_gpus} in all); choose layouts whose tp divides the node"
        )
    for (tp, replica_index, stage), node in zip(small, chosen, strict=True):
        ranks[replica_index, stage] = tuple(free[node][:tp])
        del free[node][:tp]
    return World(
        tuple(replica.layout for replica in plan.replicas),
        tuple(
            tuple(ranks[replica.index, stage] for stage in range(replica.layout.pp))
            for replica in plan.replicas
        ),
    )


def placed(plan: Plan) -> World | None:
    """Return the plan on the ranks that its file says (``meta.ranks``), None if it does not.

    Raises
    ------
    ConfigError
        If they do not fit the plan.
    """
    ranks = plan.meta.get("ranks")
    if ranks is None:
        return None
    try:
        replicas = tuple(tuple(tuple(stage) for stage in replica) for replica in ranks)
        return World(tuple(replica.layout for replica in plan.replicas), replicas)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"meta.ranks does not fit the plan {plan}: {error}; remove meta.ranks to have the plan "
            "placed anew"
        ) from None


def placed_on(plan: Plan, source: str, gpus_per_node: int | Sequence[int]) -> World:
    """Return the plan on the ranks its file says, else on those of nodes.

    So too where the file's ranks spread tensor-parallel groups over nodes, which is warned of.

    Parameters
    ----------
    source
        The plan's file, for messages.
    gpus_per_node
        Of every node, or of each.

    Raises
    ------
    ConfigError
        The file's ranks do not fit the plan, or it cannot be placed.
    """
    try:
        world = placed(plan)
    except ConfigError as error:
        raise ConfigError(error.problems.prefixed(f"{source}: ")) from None
    if world is None:
        return place(plan, gpus_per_node)
    spread = world.spread_groups(gpus_per_node)
    if not spread:
        return world
    try:
        better, instead = place(plan, gpus_per_node), "the plan is placed anew"
    except ConfigError:
        better, instead = world, "which is slow; plan for them (--gpus-per-node)"
    log.warning(
        "%s: meta.ranks spreads the tensor-parallel group %s over nodes of %s GPUs: %s",
        source, list(spread[0]), gpus_per_node, instead,
    )  # fmt: skip
    return better


def plan_within(plan: Plan, nodes: Sequence[int]) -> Plan:
    """Return a plan of as many of a plan's replicas as fewer GPUs have room for, placed on them.

    The smallest that takes the plan's longest sequences is among them; of the others large ones
    come first.

    Parameters
    ----------
    plan
        A plan for more GPUs.
    nodes
        The GPUs of each node.

    Raises
    ------
    ConfigError
        There is no room for one that takes the longest sequences.
    """
    groups, counts = plan.groups, [0] * len(plan.groups)

    def kept() -> Plan:
        pairs = zip(groups, counts, strict=True)
        return Plan(tuple(replace(group, replicas=count) for group, count in pairs if count))

    def is_added(number: int) -> bool:
        if counts[number] == groups[number].replicas:
            return False
        counts[number] += 1
        has_room = kept().num_gpus <= sum(nodes) and is_placeable(kept(), nodes)
        counts[number] -= not has_room
        return has_room

    by_size = sorted(range(len(groups)), key=lambda number: -groups[number].layout.num_gpus)
    needed = [number for number in by_size if groups[number].max_tokens == plan.max_tokens][-1]
    if not is_added(needed):
        raise ConfigError(
            f"a replica {groups[needed].layout}, which takes sequences of {plan.max_tokens} "
            f"tokens, has no place on nodes of {[*nodes]} GPUs"
        )
    while any(is_added(number) for number in by_size):
        pass
    return replace(kept(), meta={"ranks": place(kept(), nodes).as_lists()})


def is_placeable(plan: Plan, gpus_per_node: int | Sequence[int]) -> bool:
    """Return whether ``place`` succeeds."""
    try:
        place(plan, gpus_per_node)
    except ConfigError:
        return False
    return True


def pack(sizes: list[int], capacities: list[int], max_trials: int = 20_000) -> list[int] | None:
    """Return the bin of each item, or None if they do not fit.

    First fit in the given (descending) order, then backtracking over at most ``max_trials``
    choices. First fit alone is exact when every size divides the next larger one and the bins.
    """
    if sum(sizes) > sum(capacities):
        return None
    room = list(capacities)
    chosen: list[int] = []
    trials = 0
    start = 0
    while len(chosen) < len(sizes):
        size = sizes[len(chosen)]
        node = next((n for n in range(start, len(room)) if room[n] >= size), None)
        trials += 1
        if node is not None:
            room[node] -= size
            chosen.append(node)
            # equal items go to the same or a later bin, so that no packing is tried twice
            same = len(chosen) < len(sizes) and sizes[len(chosen)] == size
            start = node if same else 0
            continue
        if not chosen or trials > max_trials:
            return None
        last = chosen.pop()
        room[last] += sizes[len(chosen)]
        start = last + 1
    return chosen


def _take_nodes(free: list[list[int]], tp: int, gpus_per_node: int, plan: Plan) -> tuple[int, ...]:
    """Take whole nodes for a group that is larger than one."""
    count, rest = divmod(tp, gpus_per_node)
    whole = [node for node in range(len(free)) if len(free[node]) == gpus_per_node]
    if rest or len(whole) < count:
        why = "is no multiple of it" if rest else f"needs {count} whole nodes"
        raise ConfigError(
            f"plan {plan}: a tensor-parallel group of {tp} is larger than a node of "
            f"{gpus_per_node} GPUs and {why}; choose another tp"
        )
    taken: list[int] = []
    for node in whole[:count]:
        taken += free[node]
        free[node] = []
    return tuple(taken)
