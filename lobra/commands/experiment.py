"""The commands of `lobra experiment`, which only the project's checkout has."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import lobra
from lobra.common.errors import ConfigError

#: The command's function -> its module of the folder experiments/.
STUDIES = {
    "simulate": "experiments.simulate",
    "real": "experiments.jobs",
    "page": "experiments.reproduction",
}


def __getattr__(name: str) -> Any:
    """Return a study's command.

    Raises
    ------
    ConfigError
        If this is an installation without the folder experiments/.
    """
    if name not in STUDIES:
        raise AttributeError(name)
    root = Path(lobra.__file__).resolve().parent.parent
    if not (root / "experiments" / "simulate.py").is_file():
        raise ConfigError(
            "experiments: are in the project's checkout, not in an installation of it; run the "
            "command in an environment with an editable installation (pip install -e CHECKOUT)"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return getattr(importlib.import_module(STUDIES[name]), name)
