"""The folder of an adapter on a command line, looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "adapter_config.json"  # PEFT's


def adapter_folder_problem(folder: Path) -> str | None:
    """Return why a folder is no adapter, and what may have been meant; None if it is one."""
    if (folder / CONFIG_FILE).is_file():
        return None
    option = f"--adapter {folder}"
    if not folder.is_dir():
        return f"{option}: no such folder"
    if (folder / "config.json").is_file():
        return f"{option}: is a whole model, no adapter: give it as --model"
    inside = [*folder.glob(f"*/{CONFIG_FILE}"), *folder.glob(f"adapters/*/{CONFIG_FILE}")]
    hint = f"; give one of {', '.join(sorted(str(file.parent) for file in inside))}"
    return f"{option}: holds no {CONFIG_FILE}{hint if inside else ''}"
