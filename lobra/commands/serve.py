"""`lobra serve`: the service that Tinker's client trains against."""

from __future__ import annotations

import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.commands.launched import run_launched
from lobra.common.errors import ConfigError
from lobra.common.options import THIS_MACHINE, LauncherOptions, option_problems, within_bounds
from lobra.service.request import ServeRequest
from lobra.trainer.host_file import is_this_host, read_host_file
from lobra.trainer.launcher import await_hosts, launcher_command
from lobra.trainer.signals import EXIT_CODES

if TYPE_CHECKING:
    from lobra.service.deployment import Deployment
    from lobra.service.ranks import StartRanks
    from lobra.trainer.run_spec import RunSpec

GOES_ON = "start the service again: what tenants have sent is done then"
NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "google.protobuf")

log = logging.getLogger(__name__)


def serve(*, request: ServeRequest, launcher: LauncherOptions = THIS_MACHINE) -> int:
    """Serve a base model: tenants train adapters on it through Tinker's API.

    Every rank of the plan is a process: on this machine, on the hosts of --host-file of which this
    is the first, or under torchrun. The first start prints a key; `lobra keys` makes more. What is
    killed goes on where it was when the same command is given again.

    Raises
    ------
    ConfigError
        With every mistake of the options and the files.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name.split(".")[0]) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not installed; pip install 'lobra[serve]'")
    from lobra.service.deployment import ONE_MACHINE, prepare_deployment
    from lobra.service.ranks import on_hosts, on_this_machine
    from lobra.trainer.run import in_launcher, restart_with

    if launcher.env_file is not None:
        restart_with(launcher.env_file)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if in_launcher():
        return _serve_in_launcher(request, is_served_here=launcher.host_file is None)
    problems = option_problems(launcher)
    slots: Sequence[int] = ONE_MACHINE
    if launcher.host_file is not None:
        with problems.noted():
            slots = _slots(launcher.host_file)
    deployment = prepare_deployment(request, slots, problems)
    if launcher.host_file is None:
        return _serve(deployment, request, on_this_machine(deployment.run))
    num_ranks = deployment.run.world_size
    command = launcher_command(
        sys.argv[2:], launcher.host_file, num_ranks, launcher.server_addr, launcher.server_port,
        "serve",
    )  # fmt: skip
    start = on_hosts(command, deployment.state_folder)
    return _serve(deployment, request, start, partial(await_hosts, launcher.host_file, num_ranks))


def _slots(host_file: Path) -> Sequence[int]:
    """Return how many ranks each host takes; ConfigError if this is not the first one."""
    slots = read_host_file(host_file)
    if not is_this_host(first := next(iter(slots))):
        raise ConfigError(
            f"{host_file}: its first host is {first}, which this machine is not; a service listens "
            f"on the first host: start it there, or list this one first"
        )
    return tuple(slots.values())


def _serve_in_launcher(request: ServeRequest, is_served_here: bool) -> int:
    """Be a rank of a launcher's world, where rank 0 serves if no other process does."""
    from lobra.service.deployment import ONE_MACHINE, prepare_deployment
    from lobra.service.engine_link import serve_rank
    from lobra.service.ranks import in_this_process, serve_rank_of_hosts
    from lobra.trainer.run import run_in_launcher

    prepared: list[Deployment] = []

    def prepare(world: int, nodes: tuple[int, ...] | None) -> RunSpec:
        deployment = prepare_deployment(request, nodes or ONE_MACHINE)
        if deployment.run.world_size != world:
            raise ConfigError(
                f"the plan {deployment.run.plan} has {deployment.run.world_size} ranks, the "
                f"launcher started {world}; start one process per rank"
            )
        prepared.append(deployment)
        return deployment.run

    def rank(run: RunSpec) -> int:
        if not is_served_here:
            serve_rank_of_hosts(run)
        elif prepared:
            return _serve(prepared[0], request, in_this_process(run))
        else:
            serve_rank(run)
        return 0

    end_after_s = within_bounds(request)[0].hang_timeout
    remedy = (lambda: GOES_ON) if is_served_here else None  # else who started the launcher goes on
    outcome = run_launched(
        lambda: run_in_launcher(request.device, prepare, rank, end_after_s, remedy), remedy
    )
    return 2 if outcome is None else outcome[1]


def _serve(
    deployment: Deployment,
    request: ServeRequest,
    start: StartRanks,
    await_hosts: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal; return the exit code."""
    from lobra.service.server import Service

    service = Service(deployment, request.host, request.port)
    received: list[int] = []

    def ready() -> None:
        print(f"serving {deployment.names[0]} on {deployment.run.plan} at {service.address}")
        if service.first_key is not None:
            print(f"key of the first tenant, shown once: {service.first_key}")
        print(f"export TINKER_BASE_URL={service.address}", flush=True)

    def stop(number: int) -> None:
        received.append(number)
        log.warning("%s: ending after the pass in progress", signal.Signals(number).name)
        service.stop()

    service.run(ready, stop, start, await_hosts)
    return EXIT_CODES.get(received[0], 0) if received else 0
