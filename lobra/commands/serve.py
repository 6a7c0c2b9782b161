"""`lobra serve`: the service that Tinker's client trains against."""

from __future__ import annotations

import importlib.util
import logging
import signal

from lobra.common.errors import ConfigError
from lobra.service.request import ServeRequest
from lobra.trainer.signals import EXIT_CODES

NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "google.protobuf")

log = logging.getLogger(__name__)


def serve(*, request: ServeRequest) -> int:
    """Serve a base model: tenants train adapters on it through Tinker's API.

    Every rank of the plan is a process on this machine. The first start prints a key; `lobra keys`
    makes more. What is killed goes on where it was when the same command is given again.

    Raises
    ------
    ConfigError
        With every mistake of the options and the files.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name.split(".")[0]) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not installed; pip install 'lobra[serve]'")
    from lobra.service.deployment import prepare_deployment
    from lobra.service.server import Service

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deployment = prepare_deployment(request)
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

    service.run(ready, stop)
    return EXIT_CODES.get(received[0], 0) if received else 0
