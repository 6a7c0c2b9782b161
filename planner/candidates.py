"""Candidate layouts: what fits the memory, has times, fits the GPUs; and LobRA's proposal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.planner.step_time import pipeline_time
from lobra.profiler.cost_model import CostModel, padded_work
from lobra.profiler.profiles import MemoryProfile

PROPOSAL_MICRO_BATCHES = 16  # micro-batches per step that LobRA's proposal assumes


@dataclass(frozen=True, order=True)
class Candidate:
    """A layout that may be deployed, and the tokens its micro-batches may hold."""

    layout: Layout
    max_tokens: int


@dataclass(frozen=True)
class Candidates:
    """The candidates and, for the person who reads the plan, what was left out and why."""

    chosen: tuple[Candidate, ...]
    dropped: tuple[str, ...] = ()


def all_candidates(
    memory: MemoryProfile,
    cost_model: CostModel,
    num_gpus: int,
    longest: int,
    gpus_per_node: int,
    refused: Callable[[int, int], str | None] | None = None,
) -> Candidates:
    """Return every profiled layout, with its memory policy, within ``num_gpus`` GPUs.

    One whose policy there are no times of is left out: recomputing costs a third or more.

    Parameters
    ----------
    longest
        The longest bucket, in tokens; some layout must hold it.
    refused
        Says, for (tp, pp), why the model cannot run on a layout, or None.

    Raises
    ------
    ConfigError
        If there is no GPU, or no layout that fits, has times and holds the longest bucket.
    """
    if num_gpus < 1:
        raise ConfigError(f"--num-gpus: {num_gpus}; a plan needs at least one GPU")
    if gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node: {gpus_per_node}; a node has at least one GPU")
    where = memory.path or "memory profile"
    chosen: list[Candidate] = []
    dropped: list[str] = []
    able: list[str] = []  # left out, but large enough
    for layout in memory.layouts:
        tp, pp = layout.tp, layout.pp
        reason = None
        if layout.num_gpus > num_gpus:
            reason = f"needs {layout.num_gpus} GPUs of {num_gpus}"
        elif not cost_model.has(layout):
            under = "" if layout.memory == "keep" else f" with memory {layout.memory}"
            times = cost_model.meta.get("path", "")
            reason = f"the time profile {times} has no rows for tp {tp}{under}"
        elif tp > gpus_per_node and (tp % gpus_per_node or num_gpus < tp):
            reason = f"tp {tp} spans nodes of {gpus_per_node} GPUs but is no multiple of it"
        elif pp > cost_model.num_layers:
            reason = f"pp {pp} is more than the {cost_model.num_layers} layers"
        elif refused is not None:
            reason = refused(tp, pp)
        max_tokens = memory.max_tokens(tp, pp, layout.memory)
        if not reason:
            chosen.append(Candidate(layout, max_tokens))
            continue
        dropped.append(f"{layout}: {reason}")
        if max_tokens >= longest:
            able.append(dropped[-1])
    reach = max((candidate.max_tokens for candidate in chosen), default=0)
    if reach < longest:
        hint = f"; layouts that would hold it are out: {'; '.join(able)}" if able else ""
        shorter = f"--max-seq-length {reach} (longer sequences are cut), " if reach else ""
        raise ConfigError(
            f"{where}: no layout within {num_gpus} GPUs holds the longest bucket of {longest} "
            f"tokens (the largest holds {reach}). Ways out: {shorter}more GPUs (--num-gpus), "
            f"layers computed again (profile time and memory with --memory lean or full), fewer "
            f"tasks at once (--num-tasks), GPUs with more memory{hint}"
        )
    return Candidates(tuple(sorted(chosen)), tuple(dropped))


def propose(candidates: Candidates, cost_model: CostModel) -> Candidates:
    """Return LobRA's proposal: few layouts, each the fastest per GPU of its kind.

    For every capacity (max_tokens) keep the layout with the most tokens/s/GPU, and for every GPU
    count below that one's the fastest layout (LobRA, section 4.4).
    """
    by_capacity: dict[int, list[Candidate]] = {}
    for candidate in candidates.chosen:
        by_capacity.setdefault(candidate.max_tokens, []).append(candidate)
    keep: set[Candidate] = set()
    for capacity, group in by_capacity.items():
        speed = {c: tokens_per_gpu_second(c, cost_model, capacity) for c in group}
        best = min(group, key=lambda c: (-speed[c], c.layout.num_gpus, c))
        keep.add(best)
        for size in {c.layout.num_gpus for c in group if c.layout.num_gpus < best.layout.num_gpus}:
            same = [c for c in group if c.layout.num_gpus == size]
            keep.add(min(same, key=lambda c: (-speed[c], c)))
    out = [c for c in candidates.chosen if c not in keep]
    reasons = [
        f"{c.layout}: not proposed, others that hold {c.max_tokens} tokens are faster per GPU"
        for c in out
    ]
    return Candidates(tuple(sorted(keep)), (*candidates.dropped, *reasons))


def tokens_per_gpu_second(candidate: Candidate, cost_model: CostModel, length: int) -> float:
    """Return tokens/s/GPU of a step of 16 full micro-batches of sequences of ``length`` tokens."""
    layout = candidate.layout
    size = max(1, candidate.max_tokens // length)
    work = padded_work(size, length)
    time_ms = float(cost_model.micro_batch_time(layout, *work).total_ms)
    step_s = pipeline_time([time_ms] * PROPOSAL_MICRO_BATCHES, layout.pp) / 1000.0
    return PROPOSAL_MICRO_BATCHES * size * length / step_s / layout.num_gpus
