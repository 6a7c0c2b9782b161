"""`lobra serve`: the service that Tinker's client trains against."""

from __future__ import annotations

import importlib.util
import logging

from lobra.common.errors import ConfigError
from lobra.service.deployment import ServeRequest, prepare_deployment
from lobra.trainer.signals import EXIT_CODES

NEEDED = ("fastapi", "uvicorn", "sqlalchemy", "google.protobuf")


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
    from lobra.service.server import serve as serve_here

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deployment = prepare_deployment(request)

    def announce(address: str, key: str | None) -> None:
        print(f"serving {deployment.names[0]} on {deployment.run.plan} at {address}")
        if key is not None:
            print(f"key of the first tenant, shown once: {key}")
        print(f"export TINKER_BASE_URL={address}", flush=True)

    number = serve_here(request, deployment, announce)
    return EXIT_CODES.get(number or 0, 0)
