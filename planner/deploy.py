"""Planning: from profiles, a workload and a number of GPUs to a deployment."""

from __future__ import annotations

from collections.abc import Callable

from lobra.common.errors import ConfigError
from lobra.planner.bucketed.deploy import PATTERNS, deploy_bucketed
from lobra.planner.deployment import Deployment, Options
from lobra.planner.outcome import Progress, silent
from lobra.planner.packed.deploy import deploy_packed
from lobra.planner.workload import Workload
from lobra.profiler.cost_model import CostModel
from lobra.profiler.profiles import MemoryProfile


def deploy(
    workload: Workload,
    memory: MemoryProfile,
    cost_model: CostModel,
    num_gpus: int,
    options: Options,
    progress: Progress = silent,
    refused: Callable[[int, int], str | None] | None = None,
) -> Deployment:
    """Return the plan of the chosen pattern for the workload.

    ``refused`` says, for (tp, pp), why the model cannot run on a layout, or None.

    Raises
    ------
    ConfigError
        If the inputs do not allow a plan, see ``all_candidates``, the pattern is unknown, or one of
        LobRA's is to plan packed steps.
    """
    if options.pattern not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise ConfigError(f"pattern {options.pattern!r}: known are {known}")
    if options.time_limit_s is not None and not options.time_limit_s > 0:
        raise ConfigError(f"--time-limit: {options.time_limit_s}; a positive number of seconds")
    if options.batching == "packed":
        if options.pattern != "EXACT":
            raise ConfigError(f"pattern {options.pattern!r} plans padded buckets only")
        return deploy_packed(workload, memory, cost_model, num_gpus, options, progress, refused)
    return deploy_bucketed(workload, memory, cost_model, num_gpus, options, progress, refused)
