"""Weights & Biases: a run's curves and configuration, online or kept for `wandb sync`."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic

log = logging.getLogger(__name__)

PROJECT = "lobra"  # where WANDB_PROJECT names none
ID_FILE = "wandb/run_id"  # in the run's folder: a run that goes on is the same one there


class Wandb:
    """Writes curves to the service that wandb's own variables and settings name.

    Where there is no key for it, or it cannot be reached, they are kept in the run's folder.
    """

    def __init__(self, folder: Path, config: dict[str, Any], begin: int) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        id_path = folder / ID_FILE
        if not id_path.is_file():
            write_atomic(id_path, secrets.token_hex(8))
        settings: dict[str, Any] = dict(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=os.environ.get("WANDB_RUN_ID", id_path.read_text(encoding="utf-8")),
            resume="allow",
            dir=folder,
            config=config,
            settings={"console": "off", "quiet": True},  # the screen is the run's
        )
        asked = os.environ.get("WANDB_MODE") or None
        if asked is None and not self._wandb.setup().settings.api_key:
            log.warning("wandb: no API key; kept in %s for `wandb sync`", folder / "wandb")
            asked = "offline"
        try:
            self._run: Any = self._wandb.init(**settings, mode=asked)
        except self._wandb.errors.CommError as error:
            log.warning("wandb: %s; kept in %s for `wandb sync`", error, folder / "wandb")
            self._run = self._wandb.init(**settings, mode="offline")
        # Of steps that are trained again after a resume, both attempts are kept.
        self._run.define_metric("*", step_metric="step")

    def write(self, values: dict[str, float], step: int) -> None:
        """Write the curves' values of a step."""
        self._run.log({"step": step, **values})

    def close(self, failed: bool) -> None:
        """Write what is still in memory, and whether the run failed."""
        self._run.finish(exit_code=int(failed))
        self._wandb.teardown()  # waits until its own process has written all
