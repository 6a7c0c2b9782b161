"""The service's process: HTTP on one thread, the coordinator on another, the ranks beside it."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Listener

import uvicorn

from lobra.common.errors import ConfigError
from lobra.model.launch import run_ranks
from lobra.service.app import make_app
from lobra.service.coordinator import Coordinator
from lobra.service.deployment import Deployment
from lobra.service.engine_link import EngineLink
from lobra.service.intake import Intake
from lobra.service.ledger import Ledger
from lobra.service.sampling import Sampling
from lobra.service.tenants import add_tenant, all_tenants
from lobra.service.waiters import Waiters
from lobra.trainer.run import PRELOAD

log = logging.getLogger(__name__)

FIRST_TENANT = "default"
RANK_TARGET = "lobra.service.engine_link:serve_rank"


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
        self.coordinator = Coordinator(deployment, self.ledger, waiters.finished)
        self.sampling = Sampling(deployment, self.ledger, waiters.finished)
        self.intake = Intake(deployment, self.ledger, self.coordinator, self.sampling)
        app = make_app(self.intake, waiters)
        self.http = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))

    def run(
        self, ready: Callable[[], None], on_signal: Callable[[int], None] | None = None
    ) -> None:
        """Serve until `stop`; call ``ready`` when requests are taken.

        On the main thread signals are given to ``on_signal`` first, as `run_ranks` does.

        Raises
        ------
        RankError
            A rank failed.
        """
        run = self.deployment.run
        environment = {"DS_ACCELERATOR": "cpu"} if run.device == "cpu" else {}
        os.environ.update(environment)  # the fork server imports deepspeed with this environment
        authkey = secrets.token_bytes(32)
        with (
            tempfile.TemporaryDirectory(prefix="lobra-service-") as folder,
            Listener(os.path.join(folder, "rank0"), "AF_UNIX", authkey=authkey) as listener,
        ):
            coordinate = threading.Thread(
                target=self._coordinate, args=(listener, ready), daemon=True
            )
            coordinate.start()
            threading.Thread(target=self.sampling.run, daemon=True).start()
            try:
                run_ranks(
                    RANK_TARGET,
                    run.world_size,
                    {"run": run, "address": str(listener.address), "authkey": authkey},
                    device=run.device,
                    environment=environment,
                    preload=PRELOAD,
                    on_signal=on_signal,
                )
            finally:
                self.http.should_exit = True
                self.sampling.stop()

    def stop(self) -> None:
        """End after the pass in progress. From any thread."""
        self.http.should_exit = True
        self.coordinator.stop()
        self.sampling.stop()

    def _coordinate(self, listener: Listener, ready: Callable[[], None]) -> None:
        link = EngineLink(listener)
        self.socket.listen()  # from here on who connects is heard, as soon as the server is up
        threading.Thread(target=self.http.run, args=([self.socket],), daemon=True).start()
        ready()
        try:
            self.coordinator.run(link)
        except (EOFError, OSError):
            log.error("a rank has ended")  # which one, and why, is raised by `run`
        finally:
            link.close()  # without it no rank goes on


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
