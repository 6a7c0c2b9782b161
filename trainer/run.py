"""Start a run: on this machine, inside a launcher's world, or through deepspeed's launcher."""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lobra.common.documents import MOST_BYTES, check_regular
from lobra.common.errors import ConfigError
from lobra.common.options import within_bounds
from lobra.layout.shapes import read_shape
from lobra.model.fingerprint import fingerprint
from lobra.model.host_memory import keep_freed_memory
from lobra.model.launch import DEFAULT_PRELOAD, WatchOrder, run_ranks
from lobra.trainer.agent import agent_of, going_on, join_world
from lobra.trainer.prepare import prepare
from lobra.trainer.rank import RankResult
from lobra.trainer.request import TrainRequest
from lobra.trainer.restarts import run_with_restarts
from lobra.trainer.run_spec import RunSpec

if TYPE_CHECKING:
    from lobra.trainer.host_watch import HostWatch

log = logging.getLogger(__name__)

T = TypeVar("T")

ENV_FILE_MARK = "LOBRA_ENV_FILE"
ENV_FILE_END = "sourced"  # the last entry of a sourced environment; it is no assignment
STACKS_FOLDER = "stacks"  # in a run's folder: where ranks were when one stood still
PREPARING = timedelta(days=1)  # the longest rank 0 may tokenise
PRELOAD = (*DEFAULT_PRELOAD, "lobra.trainer.preload")


class Refusal(ConfigError):
    """A user's mistake that was found before the start; every rank raises it, one tells it."""


def train(request: TrainRequest) -> tuple[RunSpec, list[RankResult]]:
    """Train on this machine, one process a rank of the plan; return every rank's result.

    Raises
    ------
    ConfigError
        The request cannot be run; nothing was written.
    RankError, MachineError
        A rank failed, or the machine denied something, after as many restarts as were asked for.
    """
    run = prepare(request)
    return run, run_with_restarts(run, request.max_restarts, run_local)


def run_local(run: RunSpec, target: str = "lobra.trainer.rank:train_rank") -> list[RankResult]:
    """Run a prepared run on this machine, one process a rank.

    The first Ctrl-C or SIGTERM lets every rank finish its step and save a checkpoint; rank 0's
    result then names the signal.
    """
    received: list[int] = []

    def tell(number: int) -> None:
        received.append(number)
        log.warning(
            "%s: finishing the step and saving a checkpoint; once more ends at once",
            signal.Signals(number).name,
        )

    results = start_ranks(run, target, {}, tell)
    if received and results[0].stopped_at is not None:
        results[0].stop_signal = received[0]
    return results


def start_ranks(
    run: RunSpec,
    target: str,
    arguments: Mapping[str, Any],
    on_signal: Callable[[int], None] | None,
) -> list[Any]:
    """Start a run's ranks on this machine, watched, and return what each returns.

    Parameters
    ----------
    run
        What every rank is given as `run`.
    target, on_signal
        As `run_ranks` has them.
    arguments
        What the target is given beside.
    """
    environment = {"DS_ACCELERATOR": run.device}  # whatever the user's environment says
    os.environ.update(environment)  # the fork server imports deepspeed with this environment
    return run_ranks(
        target,
        run.world_size,
        {"run": run, **arguments},
        device=run.device,
        environment=environment,
        preload=PRELOAD,
        on_signal=on_signal,
        watch=WatchOrder(run.hang_timeout_s, run.output_dir / STACKS_FOLDER),
    )


def in_launcher() -> bool:
    """Return whether torchrun or deepspeed started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def train_in_launcher(
    request: TrainRequest, remedy: Callable[[], str] | None
) -> tuple[RunSpec, RankResult]:
    """Train as one rank of the world a launcher made. Collective.

    ``remedy`` and what is raised are those of `run_in_launcher`.
    """
    from lobra.trainer.rank import train_rank

    def prepared(world: int, nodes: tuple[int, ...] | None) -> RunSpec:
        agent = agent_of(os.environ, os.getppid())
        known = replace(request, launched_world=world, found_nodes=nodes, agent=agent)
        return prepare(going_on(known))

    return run_in_launcher(
        request.device,
        prepared,
        train_rank,
        within_bounds(request)[0].hang_timeout,
        remedy,
    )


def run_in_launcher(
    device: str,
    prepared: Callable[[int, tuple[int, ...] | None], RunSpec],
    target: Callable[[RunSpec], T],
    end_after_s: float | None,
    remedy: Callable[[], str] | None,
) -> tuple[RunSpec, T]:
    """Run a target as one rank of the world a launcher made. Collective.

    Parameters
    ----------
    device
        What --device says.
    prepared
        Called on rank 0 with the number of ranks, and how many each host has (None: unknown);
        returns the run for all.
    target
        Called on every rank with the run, in an initialised world that is watched.
    end_after_s, remedy
        As `HostWatch` has them.

    Returns
    -------
    tuple
        The run, and what the target returned on this rank.

    Raises
    ------
    Refusal
        On every rank, when rank 0 found a mistake, the world does not fit, or a host lacks a file.
    ConfigError
        On this rank alone, when a file on its host is damaged.
    LostHost
        A host of the run is gone.
    RuntimeError
        On every rank, when rank 0 could not prepare for another reason.
    """
    import torch
    import torch.distributed as dist

    from lobra.trainer.host_watch import HostWatch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    os.environ["DS_ACCELERATOR"] = "cuda" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        keep_freed_memory()
    join_world("nccl" if on_gpu else "gloo", os.environ)
    # Tokenising may take much longer than NCCL waits, so the others wait on a CPU group.
    waiting = dist.new_group(backend="gloo", timeout=PREPARING)
    hosts = HostWatch(waiting, end_after_s, remedy)
    try:
        return _run_in_world(prepared, target, waiting, hosts, remedy)
    except RuntimeError as error:
        if lost := hosts.reason(error):
            raise lost from error
        raise
    finally:
        hosts.end()


def _run_in_world(
    prepared: Callable[[int, tuple[int, ...] | None], RunSpec],
    target: Callable[[RunSpec], T],
    waiting: Any,
    hosts: HostWatch,
    remedy: Callable[[], str] | None,
) -> tuple[RunSpec, T]:
    """Prepare on rank 0, let every host say what it lacks, and run the target. Collective."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    sizes: list[Any] = [None] * world
    dist.all_gather_object(sizes, local_world_size(os.environ), group=waiting)
    outcome: list[Any] = [None]
    if rank == 0:
        try:
            outcome = [prepared(world, nodes_of(sizes))]
        except ConfigError as error:
            outcome = [Refusal(error.problems)]
        except Exception as error:
            log.exception("rank 0 could not prepare the run")
            outcome = [RuntimeError(f"rank 0 could not prepare the run: {error!r}")]
    dist.broadcast_object_list(outcome, src=0, group=waiting)
    if isinstance(outcome[0], Exception):
        dist.destroy_process_group()
        raise outcome[0]
    run: RunSpec = outcome[0]
    problems: list[list[str]] = [[]] * world
    speaks_for_host = os.environ.get("LOCAL_RANK", "0") == "0"
    own = host_problems(run) if speaks_for_host else []
    dist.all_gather_object(problems, own, group=waiting)
    if any(problems):
        dist.destroy_process_group()
        raise Refusal(chain.from_iterable(problems))
    from lobra.trainer.launched_watch import watch_each_other

    stacks = run.output_dir / STACKS_FOLDER
    watch_each_other(waiting, run.hang_timeout_s, stacks, hosts, remedy)

    # No clean-up if this fails: it would wait for ranks that wait for this one. The launcher ends
    # them when this process has ended.
    result = target(run)
    dist.destroy_process_group()
    return run, result


def host_problems(run: RunSpec) -> list[str]:
    """Return what this host lacks of what its ranks read, or has otherwise than rank 0's."""
    host = platform.node()
    folder = run.model_folder
    if not (folder / "config.json").is_file():
        return [
            f"{folder}: not on host {host}; the base model must lie at the same path on every host"
        ]
    try:
        found = fingerprint(folder, read_shape(folder))
    except ConfigError as error:
        return list(error.problems.prefixed(f"on host {host}: "))
    if found == run.fingerprint:
        return []
    return [f"{folder}: another model on host {host} than on that of rank 0; copy it anew"]


def local_world_size(environment: Mapping[str, str]) -> int | None:
    """Return how many ranks the launcher started on this host, None if it does not say.

    torchrun says so in LOCAL_WORLD_SIZE, deepspeed in LOCAL_SIZE.
    """
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if environment.get(name, "").isdigit() and int(environment[name]) > 0:
            return int(environment[name])
    return None


def nodes_of(sizes: Sequence[int | None]) -> tuple[int, ...] | None:
    """Return how many ranks each host has, from what each rank knows of its own; None: unknown."""
    nodes: list[int] = []
    while sum(nodes) < len(sizes):
        size = sizes[sum(nodes)]
        if size is None:
            return None
        nodes.append(size)
    return tuple(nodes)


def sourced_environment(env_file: Path) -> dict[str, str]:
    """Return this process's environment after sourcing `env_file` with bash.

    Raises
    ------
    ConfigError
        The file is missing or fails.
    """
    if not os.path.exists(env_file):
        raise ConfigError(f"--env-file {env_file}: no such file")
    check_regular(env_file, MOST_BYTES)
    script = f'set -ea; . "$0" >&2; env -0; printf "{ENV_FILE_END}\\0"'
    done = subprocess.run(
        ["bash", "-c", script, str(env_file.resolve())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise ConfigError(f"--env-file {env_file}: failed with exit code {done.returncode}")
    entries = os.fsdecode(done.stdout).split("\0")
    if ENV_FILE_END not in entries:
        raise ConfigError(
            f"--env-file {env_file}: ends the shell that reads it: want assignments, without exit"
        )
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def restart_with(env_file: Path) -> None:
    """Source `env_file` and run this command again in its environment, once.

    Every rank gets the same arguments from the launcher, so the file is sourced on every host;
    the process is replaced because libraries read their variables when they are loaded.
    """
    if os.environ.get(ENV_FILE_MARK) == str(env_file):
        return
    environment = {**sourced_environment(env_file), ENV_FILE_MARK: str(env_file)}
    command = [sys.executable, "-m", "lobra.cli", *sys.argv[1:]]
    os.execve(sys.executable, command, environment)
