"""Which models the ranks' memory holds at once: what is fixed, what each slot takes, each token.

A plan's micro-batches are bounded by its `max_tokens`, so no queue, however long, takes more memory
than one of them. What remains to be decided is whose adapters may be beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lobra.layout.layout import ADAPTER_HIDDEN, COMPUTED_AGAIN
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import ModelShape
from lobra.profiler.accelerators import load_tables
from lobra.profiler.capacity import Parts, most_growth, parts_of
from lobra.profiler.estimate_memory import Adapters, estimate_memory
from lobra.profiler.layer_memory import adapter_hidden_bytes, joint_rank
from lobra.profiler.profiles import MemoryProfile, load_memory_profile

#: A rank and target modules: what an adapter's memory follows from.
AdapterSize = tuple[int, tuple[str, ...]]
#: Of a parameter on a GPU: its gradient as it was before the pass (`trainer.engine`).
KEPT_GRADIENT_BYTES = 4


@dataclass(frozen=True)
class GroupMemory:
    """What the rank that needs most takes of a group of the plan.

    Attributes
    ----------
    group
        The group.
    parts
        What it takes beside some adapters.
    sizes, ranks
        Of those adapters, and the ranks a token goes through.
    """

    group: ReplicaGroup
    parts: Parts
    sizes: tuple[AdapterSize, ...]
    ranks: int


@dataclass(frozen=True, eq=False)
class Admission:
    """Says which adapters fit beside the largest micro-batches of a plan.

    Attributes
    ----------
    shape
        The base model's sizes.
    groups
        What ranks of each group of the plan take.
    budget_bytes
        What a rank may take.
    precision
        Of activations.
    is_joint
        Whether all tasks of a micro-batch are computed at once, as on a GPU.
    """

    shape: ModelShape
    groups: tuple[GroupMemory, ...]
    budget_bytes: int
    precision: str
    is_joint: bool

    def holds(self, adapters: Sequence[AdapterSize]) -> bool:
        """Return whether these adapters may be on the ranks at once."""
        return self.refusal(adapters) is None

    def refusal(self, adapters: Sequence[AdapterSize]) -> str | None:
        """Return why these adapters may not be on the ranks at once, None if they may."""
        needed = [(self.needed_bytes(own, adapters), own.group) for own in self.groups]
        most_bytes, group = max(needed, key=lambda pair: pair[0])
        if most_bytes <= self.budget_bytes:
            return None
        return (
            f"a rank of {group.layout} would take {size_text(most_bytes)} beside micro-batches of "
            f"{group.max_tokens} tokens, and has {size_text(self.budget_bytes)}"
        )

    def most_slots(self, adapter: AdapterSize, limit: int) -> int:
        """Return how many adapters of a size may be on the ranks at once, at most ``limit``."""
        counts = range(limit, 0, -1)
        return next((count for count in counts if self.holds([adapter] * count)), 0)

    def needed_bytes(self, memory: GroupMemory, adapters: Sequence[AdapterSize]) -> float:
        """Return what a rank of a group takes with these adapters."""
        shape, parts, tokens = self.shape, memory.parts, memory.group.max_tokens
        stages = memory.group.layout.pp
        elements = parts.elements * most_growth(memory.sizes, adapters, shape, stages)
        per_element, more_per_token = parts.bytes_per_element, 0
        if self.is_joint:
            per_element += KEPT_GRADIENT_BYTES
            if ADAPTER_HIDDEN not in COMPUTED_AGAIN[memory.group.layout.memory]:
                ranks = joint_rank([rank for rank, _ in adapters]) - memory.ranks
                more_per_token = adapter_hidden_bytes(shape, self.precision, ranks)
                more_per_token *= shape.num_layers
        activations = parts.activation_bytes + tokens * more_per_token
        activations += (tokens - parts.tokens) * parts.bytes_per_token
        exchanged = elements * parts.exchange_bytes_per_element
        return parts.weight_bytes + elements * per_element + max(activations, exchanged)


def admission_of(
    shape: ModelShape,
    plan: Plan,
    precision: str,
    device: str,
    budget_bytes: int,
    profile: Path | None,
) -> Admission:
    """Return what a plan's ranks hold: as a memory profile has it, else as the shapes say.

    Parameters
    ----------
    profile
        A memory profile, of which the rows are taken whose parts are known and measured in this
        precision; None: estimates only.

    Raises
    ------
    ConfigError
        The profile has mistakes.
    """
    measured = None if profile is None else load_memory_profile(profile)
    settings = {} if measured is None else measured.meta.get("settings", {})
    if settings.get("precision") != precision:
        measured = None
    groups = []
    for group in plan.groups:
        parts = None if measured is None else _measured(measured, group)
        if parts is None:
            groups.append(_estimated(shape, group, precision))
        else:
            sizes = tuple((rank, tuple(modules)) for rank, modules in settings["adapters"])
            ranks = joint_rank([rank for rank, _ in sizes])
            groups.append(GroupMemory(group, parts, sizes, ranks))
    return Admission(shape, tuple(groups), budget_bytes, precision, device == "cuda")


def _measured(profile: MemoryProfile, group: ReplicaGroup) -> Parts | None:
    layout = group.layout
    found = (
        parts_of(profile.meta, row)
        for row in profile.rows
        if (row.tp, row.pp, row.memory) == (layout.tp, layout.pp, layout.memory)
    )
    return next((parts for parts in found if parts is not None), None)


def _estimated(shape: ModelShape, group: ReplicaGroup, precision: str) -> GroupMemory:
    layout, size = group.layout, (1, tuple(shape.linear_sizes()))
    estimate = estimate_memory(
        shape, layout.tp, layout.pp, Adapters((size,)), precision,
        load_tables().runtime(None), layout.memory,
    )  # fmt: skip
    parts = estimate.parts(group.max_tokens)
    return GroupMemory(group, parts, (size,), ranks=1)


def size_text(size_bytes: float) -> str:
    """Return a size for people, in GiB or MiB."""
    if size_bytes >= 1 << 30:
        return f"{size_bytes / (1 << 30):.2f} GiB"
    return f"{size_bytes / (1 << 20):.1f} MiB"
