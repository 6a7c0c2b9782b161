"""Which micro-batches fit when other adapters are trained than those a profile was measured with.

A rank's memory is what is fixed (frozen weights), what each adapter takes, and what grows with the
micro-batch's tokens. A profile's sidecar has these parts of every layout, so a profile of six tasks
tells what fits beside twelve.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.layout.layout import ADAPTER_HIDDEN, COMPUTED_AGAIN
from lobra.layout.shapes import ModelShape, resolve_shape
from lobra.layout.world import adapted_layers, stage_layers
from lobra.profiler.layer_memory import adapter_hidden_bytes, joint_rank
from lobra.profiler.lookup import OF_TASKS, no_memory_profile, own_memory_path
from lobra.profiler.profiles import DEFAULT_POLICY, MemoryProfile, MemoryRow, load_memory_profile
from lobra.profiler.settings import LOW_RANK
from lobra.tasks.config import TaskConfig

STEP_TOKENS = 256  # capacities are multiples of it


@dataclass(frozen=True)
class Parts:
    """The memory of the rank of a layout that needs most, in bytes.

    Attributes
    ----------
    weight_bytes
        Frozen weights.
    elements
        Adapters' parameters on the rank, all tasks.
    bytes_per_element
        What such a parameter takes with its gradient and its share of the optimiser's state.
    exchange_bytes_per_element
        What it takes beyond that while adapters are exchanged; activations are not alive then.
    tokens, activation_bytes
        A micro-batch's size, near the budget, and what it took.
    bytes_per_token
        What a token more takes.
    """

    weight_bytes: float
    elements: float
    bytes_per_element: float
    exchange_bytes_per_element: float
    tokens: int
    activation_bytes: float
    bytes_per_token: float

    def max_tokens(
        self, budget_bytes: float, adapters: float, largest: int, more_bytes: float = 0.0
    ) -> int:
        """Return the tokens that fit beside ``adapters`` times the adapters measured.

        A token takes ``more_bytes`` more than with those. A multiple of 256, at most ``largest``;
        0 if nothing fits.
        """
        elements = adapters * self.elements
        room = budget_bytes - self.weight_bytes - elements * self.bytes_per_element
        if room < elements * self.exchange_bytes_per_element:
            return 0
        free = room - self.activation_bytes - more_bytes * self.tokens
        tokens = self.tokens + free / (self.bytes_per_token + more_bytes)
        return max(0, min(int(tokens // STEP_TOKENS), largest // STEP_TOKENS) * STEP_TOKENS)

    def as_json(self) -> dict[str, float]:
        """Return the parts as a sidecar has them."""
        return asdict(self)


def slope(tokens: Sequence[int], activation_bytes: Sequence[int]) -> float:
    """Return the bytes that a token takes by trials: of a line through them, or through nothing."""
    if len(set(tokens)) > 1:
        per_token = float(np.polyfit(tokens, activation_bytes, 1)[0])
        if per_token > 0:
            return per_token
    return max(1.0, activation_bytes[0] / tokens[0])


def parts_of(meta: Mapping[str, Any], row: MemoryRow) -> Parts | None:
    """Return the parts that a profile's sidecar has of a row, None if it has none."""
    policy = () if row.memory == DEFAULT_POLICY else (row.memory,)
    name = ",".join(map(str, (row.tp, row.pp, row.sp, *policy)))
    found = meta.get("rows", {}).get(name, {}).get("parts", {})
    names = {field.name for field in fields(Parts)}
    return Parts(**{name: found[name] for name in names}) if names <= found.keys() else None


def memory_profile_for(
    model: str, tasks: Sequence[TaskConfig], path: Path | None = None
) -> tuple[MemoryProfile, tuple[str, ...]]:
    """Return what fits beside the adapters of these tasks, and what a person should know of it.

    Without ``path``: the model's own profile (`lookup.own_memory_path`).

    Raises
    ------
    ConfigError
        If there is no profile, it has mistakes, or was measured without the dropout of the tasks.
    """
    path = path or own_memory_path(model, len(tasks))
    if not path.is_file():
        raise ConfigError(no_memory_profile(model, len(tasks), path))
    profile = load_memory_profile(path)
    fitted, notes = fitted_to(profile, tasks, resolve_shape(model))
    measured = profile.meta.get("settings", {}).get("adapter", ())
    unlike = [task.name for task in tasks if task.adapter not in (*LOW_RANK, *measured)]
    if unlike:
        notes += (
            f"{path}: was measured without adapters such as those of {', '.join(unlike)}: profile "
            f"memory with this trainer config to know what they take",
        )
    return fitted, notes


def fitted_to(
    profile: MemoryProfile, tasks: Sequence[TaskConfig], shape: ModelShape
) -> tuple[MemoryProfile, tuple[str, ...]]:
    """Return the profile for the adapters of these tasks, and notes on how that was found."""
    settings = profile.meta.get("settings", {})
    measured = settings.get("adapters")
    if measured is None:
        number = OF_TASKS.search(profile.path.stem) if profile.path else None
        if number is None or int(number[1]) == len(tasks):
            return profile, ()
        return profile, (_as_it_is(profile, int(number[1]), len(tasks)),)
    dropping = [task.name for task in tasks if task.lora_dropout > 0.0]
    if dropping and not settings.get("lora_dropout"):
        raise ConfigError(
            f"{profile.path}: was measured without lora_dropout, which {', '.join(dropping)} "
            f"{'has' if len(dropping) == 1 else 'have'}: a layer then keeps half as much again; "
            f"profile memory with this trainer config"
        )
    wanted = [[task.largest_rank, list(task.target_modules)] for task in tasks]
    if _kinds(measured) == _kinds(wanted):
        return profile, ()
    budget = settings.get("memory_budget_bytes")
    if budget in (None, "default"):
        budget = profile.meta.get("environment", {}).get("memory_budget_bytes")
    largest = settings.get("max_seq_length")
    parts = [parts_of(profile.meta, row) for row in profile.rows]
    if budget is None or largest is None or not any(parts):
        return profile, (_as_it_is(profile, len(measured), len(tasks)),)
    growth = {
        row.pp: most_growth(measured, wanted, shape, min(row.pp, shape.num_layers))
        for row in profile.rows
    }
    rows = tuple(
        replace(
            row,
            max_tokens=part.max_tokens(
                budget, growth[row.pp], largest, _more_bytes(settings, row, tasks, shape)
            ),
        )
        for row, part in zip(profile.rows, parts, strict=True)
        if part is not None
    )
    times = most_growth(measured, wanted, shape, 1)
    note = (
        f"{profile.path}: capacities of {len(measured)} adapters were reckoned anew for these "
        f"{len(tasks)}, which have {times:.2g} times their parameters; profile memory with this "
        f"trainer config to measure them"
    )
    unknown = [f"<{r.tp},{r.pp}>" for r, part in zip(profile.rows, parts, strict=True) if not part]
    left_out = f"{profile.path}: has no parts of {', '.join(unknown)}: left out"
    notes = (note, left_out) if unknown else (note,)
    return replace(profile, rows=tuple(sorted(rows))), notes


def most_growth(
    measured: Sequence[Any], wanted: Sequence[Any], shape: ModelShape, num_stages: int
) -> float:
    """Return how many times as large adapters (rank, modules) are, in the stage with most growth.

    Only of the embedding's and the head's does one stage have more than another.
    """
    stages = (
        adapted_layers(stage_layers(shape.num_layers, num_stages, stage), shape.num_layers)
        for stage in range(num_stages)
    )
    sizes = [
        [
            sum(shape.adapter_elements(rank, tuple(modules), layers) for rank, modules in adapters)
            for adapters in (wanted, measured)
        ]
        for layers in stages
    ]
    return max(now / max(1, before) for now, before in sizes)


def _more_bytes(
    settings: Mapping[str, Any], row: MemoryRow, tasks: Sequence[TaskConfig], shape: ModelShape
) -> float:
    """Return what a token takes more than measured: x A' of more ranks that it goes through.

    On a GPU those are of all tasks at once, up to `MOST_RANKS`; of all layers that wait for their
    backward pass. On a CPU, or with adapters that are sharded, a token has its own task's only,
    which are as good as none of it.
    """
    runtime = settings.get("runtime") or {}
    is_joint = settings.get("device") == "cuda" or runtime.get("adapters_sharded") is False
    if not is_joint or ADAPTER_HIDDEN in COMPUTED_AGAIN[row.memory]:
        return 0.0
    measured = joint_rank([rank for rank, _ in settings["adapters"]])
    ranks = joint_rank([task.largest_rank for task in tasks]) - measured
    precision = settings.get("precision", "bf16")
    return float(shape.num_layers * adapter_hidden_bytes(shape, precision, ranks))


def _as_it_is(profile: MemoryProfile, measured: int, wanted: int) -> str:
    return (
        f"{profile.path}: is of {measured} other adapters than these {wanted} and does not tell "
        f"what an adapter takes: used as it is; profile memory with this trainer config to be sure"
    )


def _kinds(adapters: Sequence[Any]) -> Counter[tuple[int, tuple[str, ...]]]:
    return Counter((rank, tuple(sorted(modules))) for rank, modules in adapters)
