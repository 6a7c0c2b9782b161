"""A plan: how many replicas of which layouts, and the YAML file that holds it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from lobra.common.errors import ConfigError, did_you_mean
from lobra.common.files import write_atomic
from lobra.common.models import (
    Count,
    FileModel,
    NotNegative,
    NumGpus,
    NumTokens,
    OneOf,
    Positive,
    PositiveInt,
    Text,
    load_as,
    refusal,
)
from lobra.layout.base_precision import QUANTISED
from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.layout.sequences import BATCHINGS

PLAN_DIR = Path("strategy_config")


@dataclass(frozen=True, order=True)
class ReplicaGroup:
    """``replicas`` copies of ``layout``, each holding micro-batches of up to ``max_tokens``."""

    layout: Layout
    replicas: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name, value in (("replicas", self.replicas), ("max_tokens", self.max_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{self.layout}: {name}: {value!r} is not a positive integer")

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas of the group."""
        return self.layout.num_gpus * self.replicas

    def __str__(self) -> str:
        sizes, *policy = str(self.layout).split()
        return " ".join([f"{sizes}x{self.replicas}", *policy])


@dataclass(frozen=True)
class Replica:
    """One running copy of a layout; ``index`` counts over the whole plan."""

    index: int
    layout: Layout
    max_tokens: int


@dataclass(frozen=True)
class Plan:
    """Replica groups in order, and what is known about how they were chosen.

    Raises
    ------
    ConfigError
        If there is no group.
    """

    groups: tuple[ReplicaGroup, ...]
    meta: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("a plan needs at least one replica")

    @property
    def num_gpus(self) -> int:
        """GPUs the plan occupies."""
        return sum(group.num_gpus for group in self.groups)

    @cached_property
    def replicas(self) -> tuple[Replica, ...]:
        """Every replica, in the order of the groups."""
        every = [group for group in self.groups for _ in range(group.replicas)]
        return tuple(
            Replica(index, group.layout, group.max_tokens) for index, group in enumerate(every)
        )

    @property
    def max_tokens(self) -> int:
        """The longest sequence, in tokens, that some replica can take."""
        return max(group.max_tokens for group in self.groups)

    def entries(self) -> list[dict[str, Any]]:
        """Return the groups as a plan's file has them; cp and memory only where they say more."""
        return [PlanEntry.of(group).as_plain() for group in self.groups]

    def with_memory(self, policy: str) -> Plan:
        """Return the plan with every replica under this memory policy."""
        groups = [
            replace(group, layout=replace(group.layout, memory=policy)) for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def __str__(self) -> str:
        return " ".join(str(group) for group in self.groups)


def _built(name: str) -> AfterValidator:
    """Return a check that there are layouts with such a value of a field."""

    def check(value: Any) -> Any:
        try:
            Layout(**{"tp": 1, "pp": 1, name: value})
        except ConfigError as error:
            raise ValueError(error.problems[0].removeprefix(f"layout: {name}: ")) from None
        return value

    return AfterValidator(check)


@dataclass(frozen=True)
class PlanEntry(FileModel):
    """Replicas of one layout."""

    dp: NumGpus
    """How many replicas."""
    tp: NumGpus
    """Tensor-parallel size: GPUs that share one layer."""
    pp: NumGpus
    """Pipeline size: stages the layers are divided into."""
    max_tokens: NumTokens
    """Most tokens of a micro-batch."""
    cp: Annotated[PositiveInt, _built("cp")] = 1
    """Context-parallel size: GPUs that share one sequence."""
    memory: Annotated[str, OneOf(MEMORY_POLICIES), _built("memory")] = MEMORY_POLICIES[0]
    """What a replica keeps of a layer for the backward pass."""

    @classmethod
    def of(cls, group: ReplicaGroup) -> PlanEntry:
        """Return the entry of a group."""
        layout = group.layout
        return cls(group.replicas, layout.tp, layout.pp, group.max_tokens, layout.cp, layout.memory)

    def group(self) -> ReplicaGroup:
        """Return the replicas."""
        layout = Layout(self.tp, self.pp, self.cp, self.memory)
        return ReplicaGroup(layout, self.dp, self.max_tokens)

    def as_plain(self) -> dict[str, Any]:
        """Return the entry as a file has it, without what is the default."""
        values = ((field, getattr(self, field.name)) for field in fields(self))
        return {field.name: value for field, value in values if value != field.default}


def _few_enough_gpus(entries: list[PlanEntry]) -> list[PlanEntry]:
    total = sum(entry.dp * entry.tp * entry.pp for entry in entries)
    if found := refusal(NumGpus, total):
        raise ValueError(f"its replicas need {total:,} GPUs, want {found}")
    return entries


RankMap = list[list[list[Count]]]


class ProfileFile(TypedDict, total=False):
    """A profile that a plan was made with."""

    file: str
    digest: str


class HomogeneousGroup(TypedDict):
    """Replicas of the best plan whose replicas are all alike."""

    tp: NumGpus
    pp: NumGpus
    replicas: NumGpus


class HomogeneousPlan(TypedDict, total=False):
    """The best plan whose replicas are all alike, to compare with."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    plan: list[HomogeneousGroup]
    step_time_s: Positive


class PlanMeta(TypedDict, total=False):
    """How a plan was made. Other fields are allowed: versions differ in what they note."""

    __pydantic_config__ = ConfigDict(extra="allow", use_attribute_docstrings=True)  # type: ignore[misc]

    model: Text
    num_gpus: NumGpus
    gpus_per_node: PositiveInt
    batching: Annotated[str, OneOf(BATCHINGS)]
    """How training is to fill micro-batches, unless it is told otherwise."""
    ranks: RankMap
    """Of each replica, of each of its stages, the ranks."""
    buckets: list[PositiveInt]
    """Padded lengths, in tokens."""
    expected_batch: list[Count]
    """Sequences in each bucket."""
    step_time_s: NotNegative
    sync_time_s: NotNegative
    lower_bound_s: NotNegative
    base_precision: Annotated[str, OneOf(QUANTISED)]
    """What the base's linears were kept in; left out: not quantised."""
    gap: NotNegative
    """How much faster a plan might at most be, relative to this one's step time."""
    homogeneous: HomogeneousPlan | None
    planner: Text
    cost_model: Text
    time_profile: ProfileFile
    memory_profile: ProfileFile
    version: Text


@dataclass(frozen=True)
class PlanFile(FileModel):
    """A plan: how many replicas of which layouts."""

    strategy_config: Annotated[
        list[PlanEntry], Field(min_length=1), AfterValidator(_few_enough_gpus)
    ]
    """The replicas, one entry for each layout."""
    meta: PlanMeta = field(default_factory=PlanMeta)
    """How it was made; may be left out."""


def make_plan(groups: Sequence[ReplicaGroup], meta: dict[str, Any] | None = None) -> Plan:
    """Return the plan in canonical order: by GPUs per replica, then tp; equal groups merged."""
    merged: dict[tuple[Layout, int], int] = {}
    for group in groups:
        key = (group.layout, group.max_tokens)
        merged[key] = merged.get(key, 0) + group.replicas
    order = sorted(merged, key=lambda key: (key[0].num_gpus, key[0].tp, key[1], key[0]))
    return Plan(
        tuple(ReplicaGroup(layout, merged[layout, tokens], tokens) for layout, tokens in order),
        dict(meta or {}),
    )


def plan_path(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a plan: a path as is, a name as ``strategy_config/<name>.yaml``."""
    text = os.fspath(name_or_path)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or os.path.isfile(path):
        return path
    return PLAN_DIR / f"{text}.yaml"


def load_plan(name_or_path: str | os.PathLike[str]) -> Plan:
    """Read a plan file: ``strategy_config: [{dp, tp, pp, max_tokens}]`` and, if there, ``meta``.

    An entry may also have ``cp`` (default 1) and ``memory`` (default keep).

    Raises
    ------
    ConfigError
        With every mistake of the file.
    """
    path = plan_path(name_or_path)
    if not os.path.exists(path):
        there = [other.stem for other in path.parent.glob("*.yaml")]
        raise ConfigError(
            f"{path}: no such plan{did_you_mean(path.stem, there)}; make it with "
            f"deploy_strategy_plan or give its path"
        )
    file = load_as(PlanFile, path)
    return Plan(tuple(entry.group() for entry in file.strategy_config), dict(file.meta))


def save_plan(plan: Plan, name_or_path: str | os.PathLike[str]) -> Path:
    """Write the plan file, all of it or nothing, and return its path."""
    path = plan_path(name_or_path)
    data: dict[str, Any] = {"strategy_config": plan.entries()}
    if plan.meta:
        data["meta"] = plan.meta
    write_atomic(path, yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100))
    return path
