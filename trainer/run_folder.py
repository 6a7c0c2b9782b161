"""A run's folder: whether a run may use it, and what is written into it before the start."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lobra.common.errors import ConfigError
from lobra.common.files import remove_folder, write_atomic
from lobra.common.lock import hold
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer import task_requests
from lobra.trainer.checkpoint import read_state
from lobra.trainer.checkpoint_folder import list_checkpoints
from lobra.trainer.log_parts import log_files
from lobra.trainer.run_config import read_run_config
from lobra.trainer.run_spec import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    DATA_FOLDER,
    LOCK_FILE,
    VALIDATION_FOLDER,
    RunSpec,
)


def hold_folder(folder: Path) -> None:
    """Keep the folder to this run; ConfigError if another one has it (see `hold`)."""
    hold(folder / LOCK_FILE, f"--output-dir {folder}", "run", "choose another folder")


def unusable(folder: Path, inputs: Iterable[Path] = (), option: str = "--output-dir") -> list[str]:
    """Return why nothing can be written into this folder, which may not exist yet.

    The working folder, what holds it, and the ``inputs`` of a run are no folders for its output.
    """
    whole = folder.resolve()
    if Path.cwd().is_relative_to(whole) or whole in [path.resolve() for path in inputs]:
        return [f"{option} {folder}: holds other things; choose a folder of its own"]
    nearest = folder
    while not os.path.exists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        return [f"{option} {folder}: {nearest} is a file; choose another folder"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{option} {folder}: no permission to write in {nearest}; choose another"]
    return []


def occupied(folder: Path) -> list[str]:
    """Return why no new run can be started in this folder (empty: one can)."""
    if list_checkpoints(folder):
        return [
            f"--output-dir {folder}: already holds a run; choose another folder, or go on with it "
            f"by --resume"
        ]
    has_steps = any(path.is_file() and path.stat().st_size > 0 for path in log_files(folder))
    if has_steps or (folder / ADAPTER_FOLDER).exists():
        return [
            f"--output-dir {folder}: holds a run without a checkpoint to go on from; choose "
            f"another folder, or remove this one"
        ]
    if not _is_ours(folder):  # it is the first file a run writes
        for name in (CONFIG_FILE, DATA_FOLDER, VALIDATION_FOLDER):
            if (folder / name).exists():
                return [
                    f"--output-dir {folder}: holds {name}, which is not of a run and would be "
                    f"replaced; choose another folder"
                ]
    return []


def _is_ours(folder: Path) -> bool:
    """Return whether a run has written the folder's config.yaml."""
    try:
        return "lobra" in read_run_config(folder).versions
    except ConfigError:
        return False


def write_run_folder(
    run: RunSpec,
    config: Mapping[str, Any],
    training: Sequence[TokenizedDataset],
    validation: Sequence[TokenizedDataset | None],
) -> None:
    """Take the folder of a checked run; write config.yaml and the tokenised data.

    Raises
    ------
    ConfigError
        Another run has the folder or has used it since it was checked, or it cannot be written.
    """
    folder = run.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        hold_folder(folder)
        # A run that has just ended may have left its files since they were looked for.
        if run.resume_step is not None:
            read_state(folder, run.resume_step, whole=False)
        elif problems := occupied(folder):
            raise ConfigError(problems)
        write_atomic(folder / CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False))
        is_new = run.resume_step is None
        for name in (DATA_FOLDER, VALIDATION_FOLDER, *([task_requests.FOLDER] if is_new else [])):
            if (folder / name).exists():
                remove_folder(folder / name)
        for task, (data, held_out) in enumerate(zip(training, validation, strict=True)):
            data.save(run.data_folder(task))
            if held_out is not None:
                held_out.save(run.validation_folder(task))
    except OSError as error:
        raise ConfigError(
            f"--output-dir {folder}: cannot be written ({error.strerror or error}); make room "
            f"there or choose another folder"
        ) from error
