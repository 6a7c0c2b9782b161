"""Where a run's checkpoints lie, and which are complete: known without torch."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "checkpoints"
STATE_FILE = "state.json"  # a checkpoint's last file: with it, the checkpoint is complete


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return run / FOLDER / f"step_{step}"


def list_checkpoints(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run, ascending."""
    if not (run / FOLDER).is_dir():
        return []
    matches = [re.fullmatch(r"step_(\d+)", path.name) for path in (run / FOLDER).iterdir()]
    steps = sorted(int(match[1]) for match in matches if match)
    return [step for step in steps if (step_folder(run, step) / STATE_FILE).is_file()]
