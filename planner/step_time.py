"""What a step takes: its slowest replica, then the adapters' synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

from lobra.layout.plan import Plan
from lobra.profiler.cost_model import CostModel


def pipeline_time(times: Sequence[float], pp: int) -> float:
    """Return what a replica of ``pp`` stages needs for micro-batches of these times, in their unit.

    Their sum plus pp - 1 times the longest (1F1B, the longest first; LobRA, section 4.2). 0 without
    any.
    """
    return sum(times) + (pp - 1) * max(times) if len(times) else 0.0


def sync_time_s(plan: Plan, cost_model: CostModel) -> float:
    """Return the seconds that adapters' synchronisation adds at the end of every step.

    Every rank of a replica's tensor-parallel group holds its layers' adapters whole, so each layer
    has as many holders as the replicas' tp together. 0 unless collectives were profiled and the
    cost model knows the adapters: LobRA's objective has no such term.
    """
    holders = sum(group.replicas * group.layout.tp for group in plan.groups)
    fewest_stages = min(group.layout.pp for group in plan.groups)
    layers = -(-cost_model.num_layers // fewest_stages)
    return cost_model.sync_time_ms(holders, layers / cost_model.num_layers) / 1000.0
