"""A plan: how many replicas of which layouts, and the YAML file that holds it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.layout.layout import Layout

PLAN_DIR = Path("strategy_config")
FIELDS = ("dp", "tp", "pp", "cp", "memory", "max_tokens")  # of a group of replicas in a file


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
        return [
            {
                "dp": group.replicas,
                "tp": group.layout.tp,
                "pp": group.layout.pp,
                **({"cp": group.layout.cp} if group.layout.cp > 1 else {}),
                **({"memory": group.layout.memory} if group.layout.memory != "keep" else {}),
                "max_tokens": group.max_tokens,
            }
            for group in self.groups
        ]

    def with_memory(self, policy: str) -> Plan:
        """Return the plan with every replica under this memory policy."""
        groups = [
            replace(group, layout=replace(group.layout, memory=policy)) for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def __str__(self) -> str:
        return " ".join(str(group) for group in self.groups)


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
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file():
        return path
    return PLAN_DIR / f"{text}.yaml"


def group_of(entry: Mapping[str, Any]) -> ReplicaGroup:
    """Return the replicas that an entry of `Plan.entries` stands for.

    Raises
    ------
    ConfigError
        If there is no such layout.
    """
    layout = Layout(entry["tp"], entry["pp"], entry.get("cp", 1), entry.get("memory", "keep"))
    return ReplicaGroup(layout, entry["dp"], entry["max_tokens"])


def load_plan(name_or_path: str | os.PathLike[str]) -> Plan:
    """Read a plan file: ``strategy_config: [{dp, tp, pp, max_tokens}]`` and, if there, ``meta``.

    An entry may also have ``cp`` (default 1) and ``memory`` (default keep).

    Raises
    ------
    ConfigError
        With every mistake of the file.
    """
    path = plan_path(name_or_path)
    if not path.exists():
        raise ConfigError(
            f"{path}: no such plan; make it with deploy_strategy_plan or give its path"
        )
    data = read_document(path)
    entries = data.get("strategy_config") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{path}: strategy_config: a list of {{dp, tp, pp, max_tokens}} is expected"
        )
    meta = data.get("meta") or {}
    problems = [] if isinstance(meta, dict) else [f"{path}: meta: {meta!r} is not a map"]
    groups = []
    for index, entry in enumerate(entries):
        where = f"{path}: strategy_config[{index}]"
        if not isinstance(entry, dict):
            problems.append(f"{where}: {entry!r} is not a map of dp, tp, pp, max_tokens")
            continue
        wrong = [
            f"{where}.{name}: {entry.get(name)!r} is not a positive integer"
            for name in ("dp", "tp", "pp", "max_tokens")
            if not isinstance(entry.get(name), int)
            or isinstance(entry[name], bool)
            or entry[name] < 1
        ]
        unknown = sorted(set(entry) - set(FIELDS), key=str)
        wrong += [f"{where}.{name}: unknown field" for name in unknown]
        if not wrong:
            try:
                groups.append(group_of(entry))
            except ConfigError as error:
                wrong += [f"{where}.{p.removeprefix('layout: ')}" for p in error.problems]
        problems += wrong
    if problems:
        raise ConfigError(problems)
    return Plan(tuple(groups), meta)


def save_plan(plan: Plan, name_or_path: str | os.PathLike[str]) -> Path:
    """Write the plan file, all of it or nothing, and return its path."""
    path = plan_path(name_or_path)
    data: dict[str, Any] = {"strategy_config": plan.entries()}
    if plan.meta:
        data["meta"] = plan.meta
    write_atomic(path, yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=100))
    return path
