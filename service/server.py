"""The service's process: HTTP on one thread, the coordinator on another, the ranks beside it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Listener
from pathlib import Path

import uvicorn

from lobra.common.errors import ConfigError, MachineError
from lobra.model.launch import Interrupted
from lobra.model.rank_results import RankError
from lobra.service.app import make_app
from lobra.service.coordinator import Coordinator
from lobra.service.deployment import Deployment
from lobra.service.engine_link import EngineLink, RanksEnded
from lobra.service.intake import Intake
from lobra.service.ledger import Ledger
from lobra.service.ranks import StartRanks, on_this_machine
from lobra.service.sampling import Sampling
from lobra.service.tenants import add_tenant, all_tenants
from lobra.service.waiters import Waiters
from lobra.trainer.signals import interruptible

log = logging.getLogger(__name__)

FIRST_TENANT = "default"
SOCKET_FOLDER, OWNER = "lobra-service-", "state-dir"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before ranks are started again; it doubles


class Service:
    """A deployment, its state folder and where it listens.

    Attributes
    ----------
    address
        Where clients find it.
    first_key
        Of a new state folder the key of its first tenant, which nothing else knows.
    """

    def __init__(self, deployment: Deployment, host: str, port: int) -> None:
        """Make the state folder and the port this process's own.

        Raises
        ------
        ConfigError
            Another process has one of them, or the folder is of another base model.
        """
        self.deployment = deployment
        self.socket = _bound(host, port)  # first: nothing is written where that is a mistake
        try:
            deployment.state_folder.claim(deployment.run.fingerprint, deployment.names[0])
            self.ledger = Ledger(deployment.run.output_dir)
        except ConfigError:
            self.socket.close()
            raise
        self.address = f"http://{host}:{self.socket.getsockname()[1]}"
        self.first_key: str | None = None
        if not all_tenants(self.ledger):
            self.first_key = add_tenant(self.ledger, FIRST_TENANT, is_operator=True)
        self.waiters = waiters = Waiters()
        self._stopped = threading.Event()
        patient = self.ledger.patient(self._stopped.is_set)
        self.coordinator = Coordinator(deployment, patient, waiters.finished)
        self.sampling = Sampling(deployment, patient, waiters.finished)
        self.intake = Intake(deployment, self.ledger, self.coordinator, self.sampling)
        app = make_app(self.intake, waiters)
        self.http = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        self._serves = False
        self._failure: BaseException | None = None  # of the coordinator's own

    def run(
        self,
        ready: Callable[[], None],
        on_signal: Callable[[int], None] | None = None,
        start: StartRanks | None = None,
        after_failure: Callable[[], Deployment | None] = lambda: None,
    ) -> None:
        """Serve until `stop`.

        Ranks that end after they have served are started again; requests wait meanwhile.

        Parameters
        ----------
        ready
            Called when requests are taken.
        on_signal
            On the main thread told of the first signal, as `run_ranks` does.
        start
            Starts the ranks; by default on this machine.
        after_failure
            Waits, before they are started again, for what they need; returns the deployment that is
            started then, None: the one there was.

        Raises
        ------
        RankError, MachineError
            The ranks could not be started.
        """
        start = start or on_this_machine(self.deployment.run)
        authkey = secrets.token_bytes(32)
        with (
            socket_folder(self.deployment.run.output_dir) as folder,
            Listener(os.path.join(folder, "rank0"), "AF_UNIX", authkey=authkey) as listener,
        ):
            arguments = (listener, ready)
            threading.Thread(target=self._coordinate, args=arguments, daemon=True).start()
            threading.Thread(target=self.sampling.run, daemon=True).start()
            try:
                begin = partial(start, str(listener.address), authkey, on_signal)
                self._keep_ranks(begin, after_failure, on_signal)
            finally:
                self._stopped.set()
                self.http.should_exit = True
                self.sampling.stop()

    def stop(self) -> None:
        """End after the pass in progress. From any thread."""
        self._stopped.set()
        self.http.should_exit = True
        self.coordinator.stop()
        self.sampling.stop()

    def _keep_ranks(
        self,
        start: Callable[[], None],
        after_failure: Callable[[], Deployment | None],
        on_signal: Callable[[int], None] | None = None,
    ) -> None:
        """Start the ranks, and again when they have ended, until the service ends."""
        pause_s = FIRST_PAUSE_S
        while True:
            begun = time.monotonic()
            try:
                start()
                why = "the ranks have ended"
            except Interrupted:
                return
            except (RankError, MachineError) as error:
                if not (self._serves or self._failure):
                    raise
                why = str(error)
            if self._failure is not None:
                raise self._failure
            if self._stopped.is_set():
                return
            if time.monotonic() - begun > LONGEST_PAUSE_S:  # they had come up
                pause_s = FIRST_PAUSE_S
            self.coordinator.lose_ranks(_in_a_line(why))
            log.error("%s\nrequests wait, the ranks are started again in %.0f s", why, pause_s)
            try:
                with interruptible():
                    if self._stopped.wait(pause_s):
                        return
                    other = after_failure()
            except Interrupted as interruption:
                if on_signal is not None:
                    on_signal(interruption.signal)
                return
            if other is not None:
                self.coordinator.deployment = other
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)

    def _coordinate(self, listener: Listener, ready: Callable[[], None]) -> None:
        """Carry requests out by the ranks that come; when they have ended, by the next ones."""
        while True:
            with suppress(RanksEnded), closing(EngineLink(listener)) as link:
                try:
                    if not self._serves:
                        self._open(ready)
                    self.coordinator.run(link)
                    return
                except RanksEnded:
                    raise
                except BaseException as error:
                    self._failure = error
                    raise
            if self._stopped.is_set():
                return

    def _open(self, ready: Callable[[], None]) -> None:
        """Take requests from now on."""
        self._serves = True
        self.socket.listen()  # who connects is heard as soon as the server is up
        threading.Thread(target=self.http.run, args=([self.socket],), daemon=True).start()
        ready()


@contextmanager
def socket_folder(state_dir: Path) -> Iterator[str]:
    """Have a folder for a service's socket, which says whose it is, for as long as a block lasts.

    What a service of the same state folder has left when it was killed is removed: two at once
    cannot have that.
    """
    for owner in Path(tempfile.gettempdir()).glob(f"{SOCKET_FOLDER}*/{OWNER}"):
        with suppress(OSError):  # another user's
            if owner.read_bytes() == os.fsencode(state_dir):
                shutil.rmtree(owner.parent)
    with tempfile.TemporaryDirectory(prefix=SOCKET_FOLDER) as folder:
        Path(folder, OWNER).write_bytes(os.fsencode(state_dir))
        yield folder


def _in_a_line(why: str) -> str:
    """Return a failure without its traceback."""
    who, traceback, rest = why.strip().partition("Traceback")
    return f"{who}{rest.splitlines()[-1]}" if traceback else who.splitlines()[0]


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that can listen there; ConfigError if none can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error
    return found
