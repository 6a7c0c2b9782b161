"""What is asked to be served: the options of `lobra serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from lobra.common import models
from lobra.common.options import (
    AWAIT_HOSTS_S,
    AwaitHosts,
    Device,
    Int,
    ModelName,
    PositiveNumber,
    TimeProfile,
    Within,
    as_options,
)
from lobra.layout.memory_policy import MemoryPolicy

OptionalPlan = Annotated[
    str | None,
    Parameter(help="Name or path of the plan; by default one replica <1,1>.", metavar="NAME"),
]


@as_options
@dataclass(frozen=True)
class ServeRequest:
    """What is served, and where.

    Parameters
    ----------
    host
        Address to listen at.
    port
        Port to listen at.
    state_dir
        Where the service keeps all it must not forget.
    name
        What clients call the base model; by default what --model says.
    precision
        By default fp32 on CPU, bf16 on GPU; fp64, everything included, is for proofs: slow.
    max_slots
        Models that are on the ranks at once; others wait in the state folder.
    max_rank
        The largest rank of an adapter.
    memory_profile
        CSV tp,pp,sp,max_tokens with its .meta.json; by default the model's, else estimates.
    memory_budget
        Of one rank, such as 40GB; by default this machine's free memory by ranks on a CPU, 90 % of
        the memory on a GPU.
    hang_timeout
        Start the ranks again when all have stood still for S seconds, or one is stopped for as
        long; by default 600, or 20 times the longest pass. Before the first it is at least 600.
    await_hosts
        With --host-file: wait S seconds for a host that is lost; then go on without it, on those
        replicas that the others have room for.
    """

    model: ModelName
    strategy_config: OptionalPlan = None
    host: Annotated[str, Within(models.HostName)] = "127.0.0.1"
    port: Annotated[Int, Within(models.Port)] = 8000
    state_dir: Path = Path("runs/service")
    name: str | None = None
    precision: Literal["fp32", "bf16", "fp64"] | None = None
    device: Device = "auto"
    memory: MemoryPolicy | None = None
    max_slots: Annotated[Int, Within(models.up_to(2**16))] = 16
    max_rank: Annotated[Int, Within(models.Rank)] = 128
    time_profile: TimeProfile = None
    memory_profile: Annotated[Path | None, Parameter(metavar="CSV")] = None
    memory_budget: Annotated[str | None, Parameter(metavar="SIZE")] = None
    hang_timeout: Annotated[PositiveNumber | None, Parameter(metavar="S")] = None
    await_hosts: AwaitHosts = AWAIT_HOSTS_S
