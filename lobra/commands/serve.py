"""`lobra serve`: the service that Tinker's client trains against."""

from __future__ import annotations

import importlib.util
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lobra.commands.launched import run_launched
from lobra.common.errors import ConfigError
from lobra.common.options import THIS_MACHINE, LauncherOptions, option_problems, within_bounds
from lobra.layout.placement import plan_within
from lobra.layout.plan import save_plan
from lobra.service.request import ServeRequest
from lobra.trainer.arguments import on_plan
from lobra.trainer.host_file import is_this_host
from lobra.trainer.launcher import launcher_command
from lobra.trainer.run_hosts import RunHosts
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
    hosts: RunHosts | None = None
    if launcher.host_file is not None:
        with problems.noted():
            hosts = _hosts(launcher.host_file, request)
    slots = ONE_MACHINE if hosts is None else tuple(hosts.slots.values())
    deployment = prepare_deployment(request, slots, problems)
    if hosts is None:
        return _serve(deployment, request, on_this_machine(deployment.run))
    hosts.check_answers(deployment.run.world_size)
    hosted = _OnHosts(request, launcher, hosts, deployment, deployment)
    start = on_hosts(hosted.command, deployment.state_folder)
    return _serve(deployment, request, start, hosted.after_failure)


def _hosts(host_file: Path, request: ServeRequest) -> RunHosts:
    """Return the hosts of a file; ConfigError if this is not the first one."""
    hosts = RunHosts.read(host_file, request.await_hosts)
    if not is_this_host(first := next(iter(hosts.listed))):
        raise ConfigError(
            f"{host_file}: its first host is {first}, which this machine is not; a service listens "
            f"on the first host: start it there, or list this one first"
        )
    return hosts


@dataclass
class _OnHosts:
    """A service on hosts, some of which may be lost for now.

    Attributes
    ----------
    request, launcher, hosts
        What is served, and where.
    whole, present
        The deployment on all hosts, and the one that is there.
    """

    request: ServeRequest
    launcher: LauncherOptions
    hosts: RunHosts
    whole: Deployment
    present: Deployment

    def command(self) -> list[str]:
        """Return the launcher's command that starts the ranks."""
        words = sys.argv[2:]
        if self.present is not self.whole:
            words = on_plan(words, self.whole.state_folder.plan_file)
        return launcher_command(
            words, self.hosts, self.present.run.world_size,
            self.launcher.server_addr, self.launcher.server_port, "serve",
        )  # fmt: skip

    def after_failure(self) -> Deployment:
        """Wait for hosts; return the deployment on those that are there."""
        found = self.hosts.after_failure(self.present.run.plan, self._without_lost)
        self.present = found or self.present
        return self.present

    def _without_lost(self, left: Mapping[str, int], reason: str) -> Deployment:
        """Return a deployment on the hosts that are left; ConfigError if there is none."""
        from lobra.service.deployment import prepare_deployment

        found = self.whole
        if len(left) < len(self.hosts.listed):
            plan = plan_within(found.run.plan, tuple(left.values()))
            file = save_plan(plan, found.state_folder.plan_file)
            smaller = replace(self.request, strategy_config=str(file), memory=None)
            found = prepare_deployment(smaller, tuple(left.values()))
        log.warning(
            "%s: the service goes on on %s instead of %s",
            reason, found.run.plan, self.present.run.plan,
        )  # fmt: skip
        return found


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
    after_failure: Callable[[], Deployment | None] = lambda: None,
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

    service.run(ready, stop, start, after_failure)
    return EXIT_CODES.get(received[0], 0) if received else 0
