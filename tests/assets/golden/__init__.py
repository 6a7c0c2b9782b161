"""Golden adapters, and what they were trained from (see make.py)."""

import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent


def copy_inputs(folder: Path) -> None:
    """Copy what they were trained from into a folder: all but the plan."""
    for name in ("base", "data", "start"):
        shutil.copytree(HERE / name, folder / name)
    for name in ("tasks.json", "time.csv"):
        shutil.copy(HERE / name, folder)
