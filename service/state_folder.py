"""The folder of all that a service must not forget: where in it what is kept.

No folder in it changes once it is there: what is written again gets another name. So what the
ledger names can be copied while the service runs (`service.backup`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lobra.common import lock
from lobra.common.documents import parsing, read_json
from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic
from lobra.service.tables import CheckpointRow

DEPLOYMENT_FILE = "deployment.json"
LEDGER_FILE = "ledger.sqlite"
MODELS, SNAPSHOTS = "models", "snapshots"


@dataclass(frozen=True)
class StateFolder:
    """A service's folder by its path."""

    path: Path

    def claim(self, fingerprint: str, name: str) -> None:
        """Make it this process's own, and note which base model it is for.

        Parameters
        ----------
        fingerprint, name
            Of the base model: what it is known by, and what users call it.

        Raises
        ------
        ConfigError
            Another service uses it, it is of another base model, or cannot be written.
        """
        file = self.path / DEPLOYMENT_FILE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock("stop it, or give another")
            with parsing(file):
                is_other = file.is_file() and read_json(file)["base_model"] != fingerprint
            if not is_other:
                write_atomic(file, json.dumps({"base_model": fingerprint}) + "\n")
        except OSError as error:
            raise ConfigError(
                f"--state-dir {self.path}: cannot be used ({error.strerror}); give another"
            ) from error
        if is_other:
            raise ConfigError(
                f"--state-dir {self.path}: what is trained there is of another base model; give a "
                f"folder of its own for {name}"
            )

    def lock(self, remedy: str) -> None:
        """Keep every other service out; ConfigError if one is there."""
        lock.hold(self.path / "lock", f"--state-dir {self.path}", "service", remedy)

    @property
    def rank0_file(self) -> Path:
        """Where rank 0 finds the service, if another host's launcher has started it."""
        return self.path / "rank0.json"

    @property
    def plan_file(self) -> Path:
        """The plan that ranks are on while hosts are lost."""
        return self.path / "plan.yaml"

    def model(self, model_id: str) -> Path:
        """Return the folder of a model; its name is checked when it is made."""
        return self.path / MODELS / model_id.replace(":", "_")

    def checkpoint(self, row: CheckpointRow) -> Path:
        """Return the folder of a checkpoint."""
        return self.model(row.model_id) / row.kind / f"{row.name}.{row.seq_id}"

    def snapshot(self, model_id: str, seq_id: int) -> Path:
        """Return the folder of a model's snapshot after a request."""
        return self.model(model_id) / SNAPSHOTS / str(seq_id)


def other_things(folder: Path) -> list[str]:
    """Return why a service cannot use a folder: it holds other things, which would be removed."""
    is_ours = any((folder / name).is_file() for name in (DEPLOYMENT_FILE, LEDGER_FILE))
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        return [f"--state-dir {folder}: holds other things; choose a folder of its own"]
    return []
