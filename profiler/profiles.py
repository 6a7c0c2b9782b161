"""Profile files: what was measured, one row at a time, and the sidecar that says how."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lobra.common.errors import ConfigError
from lobra.common.models import NumGpus, NumTokens, refusal
from lobra.layout.layout import Layout
from lobra.profiler.csv_rows import finite_ms, read_rows, whole_numbers
from lobra.profiler.sidecar import read_meta

TIME_COLUMNS = ("tp", "seq_len", "mbs", "time")
MEMORY_COLUMNS = ("tp", "pp", "sp", "max_tokens")
POLICY_COLUMN = "memory"  # optional, the last: the memory policy a row was measured under
DEFAULT_POLICY = "keep"
PROFILE_DIR = Path("exp_result/profile")
MONOTONE_SLACK_TOKENS = 256  # a memory profile is bisected in steps of 256 tokens
# What may be lost by noise, and, between numbers of stages, because one of them does not divide the
# layers: its first stage then keeps up to an eighth more layers' activations in flight.
MONOTONE_SLACK, STAGES_SLACK = 1 / 32, 1 / 8
CONTRADICTION = 10  # times a longer sequence's time, which no noise explains


@dataclass(frozen=True, eq=False)
class TimeProfile:
    """Times of one transformer layer, forward + backward, one row per measurement.

    Attributes
    ----------
    path
        The file, for messages; None when made in memory.
    tp, seq_len, mbs
        int64 [rows]: tensor-parallel size, tokens per sequence, sequences per micro-batch.
    time_ms
        float64 [rows], positive and finite.
    meta
        The sidecar (hardware, versions, measured or estimated), empty when there is none.
    digest
        The first 16 hexadecimal digits of the file's SHA-256.
    memory
        The memory policy that the layer was run under, of all rows.
    """

    tp: np.ndarray
    seq_len: np.ndarray
    mbs: np.ndarray
    time_ms: np.ndarray
    path: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    memory: str = DEFAULT_POLICY

    @property
    def tps(self) -> tuple[int, ...]:
        """The tensor-parallel sizes profiled, ascending."""
        return tuple(int(tp) for tp in np.unique(self.tp))

    def __len__(self) -> int:
        return len(self.tp)


@dataclass(frozen=True, order=True)
class MemoryRow:
    """The largest micro-batch, in tokens, that fits ``<tp,pp>`` under a policy (0: none fits)."""

    tp: int
    pp: int
    sp: int
    max_tokens: int
    memory: str = DEFAULT_POLICY


@dataclass(frozen=True, eq=False)
class MemoryProfile:
    """What fits each layout. Rows with ``max_tokens`` 0 (nothing fits) are kept."""

    rows: tuple[MemoryRow, ...]
    path: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def max_tokens(self, tp: int, pp: int, memory: str = DEFAULT_POLICY) -> int:
        """Return the tokens of the largest micro-batch of ``<tp,pp>``; 0 if not profiled."""
        wanted = tp, pp, memory
        return max(
            (row.max_tokens for row in self.rows if (row.tp, row.pp, row.memory) == wanted),
            default=0,
        )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts, each with its memory policy, that hold at least one token, ordered."""
        return tuple(
            sorted({Layout(r.tp, r.pp, memory=r.memory) for r in self.rows if r.max_tokens > 0})
        )


def model_slug(model: str) -> str:
    """Return the model's name as profile files carry it: a name as is, a folder's last part."""
    return Path(model).name or model


def num_layers_of(model: str) -> int:
    """Return the transformer layers of ``tiny``, ``7B``, ... or a Hugging Face model folder.

    Raises
    ------
    ConfigError
        If the model is neither.
    """
    from lobra.layout.shapes import resolve_shape

    return resolve_shape(model).num_layers


def adapter_elements_of(model: str, adapters: Iterable[tuple[int, tuple[str, ...]]]) -> int:
    """Return the parameters, over all layers, of adapters given as (rank, target modules)."""
    from lobra.layout.shapes import resolve_shape

    shape = resolve_shape(model)
    return sum(shape.adapter_elements(rank, targets) for rank, targets in adapters)


def layout_problem_of(model: str, tp: int, pp: int) -> str | None:
    """Return why ``<tp,pp>`` cannot run the model (heads not divisible, ...), or None."""
    from lobra.layout.shapes import layout_problem, resolve_shape

    return layout_problem(resolve_shape(model), tp, pp)


def default_time_path(model: str) -> Path:
    """Return ``exp_result/profile/cost_model/profile_time_<model>.csv``."""
    return PROFILE_DIR / "cost_model" / f"profile_time_{model_slug(model)}.csv"


def default_head_path(model: str) -> Path:
    """Return where the time of embedding and head is kept, columns as the layer's."""
    return PROFILE_DIR / "cost_model" / f"profile_head_{model_slug(model)}.csv"


def default_memory_path(model: str, num_tasks: int) -> Path:
    """Return ``exp_result/profile/memory/max_tokens_<model>_<n>tasks.csv``."""
    return PROFILE_DIR / "memory" / f"max_tokens_{model_slug(model)}_{num_tasks}tasks.csv"


def load_time_profile(path: str | os.PathLike[str], memory: str = DEFAULT_POLICY) -> TimeProfile:
    """Return the rows of a time profile that were measured under a memory policy.

    Raises
    ------
    ConfigError
        If the file has mistakes (see `load_time_profiles`) or no such rows.
    """
    profiles = load_time_profiles(path)
    if memory not in profiles:
        raise ConfigError(
            f"{path}: has no rows of memory {memory}, only of {', '.join(profiles)}; measure them "
            f"with `lobra profile time --memory {memory}`"
        )
    return profiles[memory]


def load_time_profiles(path: str | os.PathLike[str]) -> dict[str, TimeProfile]:
    """Read a CSV with columns ``tp,seq_len,mbs,time`` (ms) and, if it has it, ``memory``.

    Further columns are ignored. Rows that repeat (tp, seq_len, mbs) are kept: they are repeated
    measurements. Returns the rows of each memory policy; without the column all are of "keep".

    Raises
    ------
    ConfigError
        With every mistake of the file: it is missing or empty, lacks a column, or a row is cut
        short, not a number, not finite or not positive.
    """
    path = Path(path)
    rows, digest = read_rows(path, TIME_COLUMNS, "lobra profile time", (POLICY_COLUMN,))
    problems: list[str] = []
    values: dict[str, list[tuple[float, ...]]] = {}
    for line, row in rows:
        policy = _policy(path, line, row, DEFAULT_POLICY, problems)
        numbers = whole_numbers(path, line, row, TIME_COLUMNS[:3], problems)
        time_ms = finite_ms(path, line, row["time"], problems)
        if numbers is None or time_ms is None:
            continue
        bad = [name for name, value in zip(TIME_COLUMNS, numbers, strict=False) if value < 1]
        problems += [f"{path}: line {line}: {name}: must be at least 1" for name in bad]
        if time_ms <= 0:
            problems.append(f"{path}: line {line}: time: {time_ms} ms; a time is positive")
        values.setdefault(policy, []).append((*numbers, time_ms))
    if problems:
        raise ConfigError(problems)
    meta = read_meta(path)
    profiles = {}
    for policy, rows_of in values.items():
        table = np.array(rows_of, dtype=np.float64)
        tp, seq_len, mbs = (table[:, column].astype(np.int64) for column in range(3))
        profiles[policy] = TimeProfile(tp, seq_len, mbs, table[:, 3], path, meta, digest, policy)
    return profiles


def no_use(profile: TimeProfile) -> list[str]:
    """Return a problem for every tp whose rows say nothing, or contradict each other.

    One shape says nothing of longer or shorter sequences. Noise doubles a time; rows of which a
    longer sequence takes a tenth of a shorter one's time are of two machines, or two units.
    """
    problems = []
    path = profile.path
    for tp in profile.tps:
        rows = np.flatnonzero(profile.tp == tp)
        shapes = set(zip(profile.seq_len[rows], profile.mbs[rows], strict=True))
        if len(shapes) < 2:
            problems.append(
                f"{path}: tp {tp}: all rows are of one shape, want at least two numbers of tokens; "
                f"measure more with `lobra profile time`"
            )
        for mbs in np.unique(profile.mbs[rows]):
            own = rows[profile.mbs[rows] == mbs]
            own = own[np.lexsort((-profile.time_ms[own], profile.seq_len[own]))]
            longest_ms = np.maximum.accumulate(profile.time_ms[own])
            less = np.flatnonzero(profile.time_ms[own] * CONTRADICTION < longest_ms)
            if len(less):
                row = own[less[0]]
                problems.append(
                    f"{path}: tp {tp}: {mbs} sequences of {profile.seq_len[row]} tokens in "
                    f"{profile.time_ms[row]} ms, but as many no longer ones took "
                    f"{longest_ms[less[0]]} ms; measure them again"
                )
    return problems


def load_memory_profile(path: str | os.PathLike[str]) -> MemoryProfile:
    """Read a CSV with columns ``tp,pp,sp,max_tokens`` and, if it has it, ``memory``.

    Without that column all rows are of "keep", or of "full" if the sidecar says that the file was
    made with gradient checkpointing, as files of before the column do.

    Raises
    ------
    ConfigError
        With every mistake of the file; also when the rows of a policy are not monotone: more GPUs
        per layer (tp) or more stages (pp) must not hold fewer tokens, up to one step of 256 tokens
        and what noise and stages of unequal length explain.
    """
    path = Path(path)
    rows, digest = read_rows(path, MEMORY_COLUMNS, "lobra profile memory", (POLICY_COLUMN,))
    meta = read_meta(path)
    recomputed = meta.get("settings", {}).get("gradient_checkpointing", False)
    default = "full" if recomputed else DEFAULT_POLICY
    problems: list[str] = []
    table: list[MemoryRow] = []
    seen: dict[tuple[int, int, int, str], int] = {}
    for line, row in rows:
        policy = _policy(path, line, row, default, problems)
        numbers = whole_numbers(path, line, row, MEMORY_COLUMNS, problems)
        if numbers is None:
            continue
        tp, pp, sp, max_tokens = numbers
        entry = MemoryRow(tp, pp, sp, max_tokens, policy)
        if entry.tp < 1 or entry.pp < 1 or entry.sp < 0 or entry.max_tokens < 0:
            problems.append(f"{path}: line {line}: tp and pp are at least 1, max_tokens at least 0")
            continue
        if found := max_tokens and refusal(NumTokens, max_tokens):
            problems.append(f"{path}: line {line}: max_tokens: {max_tokens}, want {found}")
            continue
        if found := refusal(NumGpus, tp * pp):
            problems.append(f"{path}: line {line}: <{tp},{pp}> needs {tp * pp} GPUs, want {found}")
            continue
        key = (entry.tp, entry.pp, entry.sp, policy)
        if key in seen:
            problems.append(
                f"{path}: line {line}: <{entry.tp},{entry.pp}> sp {entry.sp} is already on line "
                f"{seen[key]}; keep one"
            )
            continue
        seen[key] = line
        table.append(entry)
    if not problems:
        problems = _not_monotone(path, table)
    if problems:
        raise ConfigError(problems)
    return MemoryProfile(tuple(sorted(table)), path, meta, digest)


def _policy(path: Path, line: int, row: dict[str, str], default: str, problems: list[str]) -> str:
    """Return the row's memory policy; the default, with the problem noted, if there is no such."""
    policy = row[POLICY_COLUMN] or default
    try:
        return Layout(1, 1, memory=policy).memory
    except ConfigError as error:
        reason = error.problems[0].removeprefix("layout: memory: ")
        problems.append(f"{path}: line {line}: {POLICY_COLUMN}: {reason}")
        return default


def _not_monotone(path: Path, table: list[MemoryRow]) -> list[str]:
    problems = []
    for less in table:
        for more in table:
            alike = (more.sp, more.memory) == (less.sp, less.memory)
            neighbours = more.tp >= less.tp and more.pp >= less.pp and alike
            share = MONOTONE_SLACK if more.pp == less.pp else STAGES_SLACK
            slack = MONOTONE_SLACK_TOKENS + less.max_tokens * share
            if neighbours and more.max_tokens < less.max_tokens - slack:
                problems.append(
                    f"{path}: not monotone: <{more.tp},{more.pp}> holds {more.max_tokens} tokens, "
                    f"fewer than <{less.tp},{less.pp}> with {less.max_tokens}; measure both again"
                )
    return problems
