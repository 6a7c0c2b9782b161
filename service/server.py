"""The service's process: HTTP on one thread, the coordinator on another, the ranks beside it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
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
from lobra.service.deployment import Deployment, ServeRequest, claim_state_folder
from lobra.service.engine_link import EngineLink
from lobra.service.intake import Intake
from lobra.service.ledger import Ledger
from lobra.service.tenants import add_tenant, all_tenants
from lobra.service.waiters import Waiters
from lobra.trainer.run import PRELOAD

log = logging.getLogger(__name__)

FIRST_TENANT = "default"


def serve(
    request: ServeRequest, deployment: Deployment, announce: Callable[[str, str | None], None]
) -> int | None:
    """Serve until a signal comes; return its number.

    Parameters
    ----------
    request
        Where to listen.
    deployment
        What is served.
    announce
        Is called when requests are taken, with the service's address and, of a new state folder,
        the key of its first tenant.

    Raises
    ------
    ConfigError
        The state folder or the port is in use.
    RankError
        A rank failed.
    """
    claim_state_folder(deployment)
    ledger = Ledger(deployment.run.output_dir)
    listening = _listen(request.host, request.port)
    address = f"http://{request.host}:{request.port}"
    key = None if all_tenants(ledger) else add_tenant(ledger, FIRST_TENANT)
    waiters = Waiters()
    coordinator = Coordinator(deployment, ledger, waiters.finished)
    app = make_app(Intake(deployment, ledger, coordinator), waiters)
    http = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        log.warning("%s: ending after the pass in progress", signal.Signals(number).name)
        http.should_exit = True
        coordinator.stop()

    run = deployment.run
    environment = {"DS_ACCELERATOR": "cpu"} if run.device == "cpu" else {}
    os.environ.update(environment)  # the fork server imports deepspeed with this environment
    authkey = secrets.token_bytes(32)
    with (
        tempfile.TemporaryDirectory(prefix="lobra-service-") as folder,
        Listener(os.path.join(folder, "rank0"), "AF_UNIX", authkey=authkey) as listener,
    ):

        def coordinate() -> None:
            link = EngineLink(listener)
            threading.Thread(target=http.run, args=([listening],), daemon=True).start()
            announce(address, key)
            try:
                coordinator.run(link)
            except (EOFError, OSError):
                log.error("the ranks have ended")  # and say why
            finally:
                link.close()

        threading.Thread(target=coordinate, daemon=True).start()
        run_ranks(
            "lobra.service.engine_link:serve_rank",
            run.world_size,
            {"run": run, "address": str(listener.address), "authkey": authkey},
            device=run.device,
            environment=environment,
            preload=PRELOAD,
            on_signal=stop,
        )
    return received[0] if received else None


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there.

    Raises
    ------
    ConfigError
        It cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error
    return listening
