"""Where a service's ranks are: on this machine, on a host file's, or in a launcher's world."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from lobra.common.errors import MachineError
from lobra.service.engine_link import serve_rank
from lobra.service.state_folder import StateFolder
from lobra.trainer.launcher import run_launcher
from lobra.trainer.run import start_ranks
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.signals import EXIT_CODES

RANK_TARGET = "lobra.service.engine_link:serve_rank"


class StartRanks(Protocol):
    """Starts ranks, and returns when they have ended as the service has told them to."""

    def __call__(
        self, address: str, authkey: bytes, on_signal: Callable[[int], None] | None
    ) -> None:
        """Have rank 0 ask for orders at an address.

        Parameters
        ----------
        address, authkey
            Where the service listens, and what it lets in.
        on_signal
            Told of the first SIGINT or SIGTERM that this process gets meanwhile.

        Raises
        ------
        RankError, MachineError
            They have ended by themselves.
        """


def on_this_machine(run: RunSpec) -> StartRanks:
    """Return what starts a process for every rank."""

    def start(address: str, authkey: bytes, on_signal: Callable[[int], None] | None) -> None:
        start_ranks(run, RANK_TARGET, {"address": address, "authkey": authkey}, on_signal)

    return start


def on_hosts(command: Callable[[], Sequence[str]], folder: StateFolder) -> StartRanks:
    """Return what starts ranks by a launcher's command, as it is then; rank 0 is on this host.

    Its process is not a child of this one, so the address is in the state folder for it.
    """

    def start(address: str, authkey: bytes, on_signal: Callable[[int], None] | None) -> None:
        told = json.dumps({"address": address, "authkey": authkey.hex()})
        folder.rank0_file.unlink(missing_ok=True)
        with os.fdopen(os.open(folder.rank0_file, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write(told)
        code = run_launcher(command(), on_signal)
        if code not in (0, *EXIT_CODES.values()):
            raise MachineError(
                f"the launcher of the hosts' ranks ended with exit code {code}: what its ranks, or "
                f"ssh, have said above is why"
            )

    return start


def serve_rank_of_hosts(run: RunSpec) -> None:
    """Be one of the ranks that `on_hosts` starts; rank 0 finds the service by the state folder."""
    if os.environ["RANK"] != "0":
        return serve_rank(run)
    told = json.loads(StateFolder(run.output_dir).rank0_file.read_text(encoding="utf-8"))
    serve_rank(run, told["address"], bytes.fromhex(told["authkey"]))


def in_this_process(run: RunSpec) -> StartRanks:
    """Return what makes this process rank 0, in a launcher's world that is there."""

    def start(address: str, authkey: bytes, on_signal: Callable[[int], None] | None) -> None:
        serve_rank(run, address, authkey, on_signal)

    return start
