"""`lobra --install-completion`: the shell completes commands and options."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Literal

from cyclopts.completion.detect import ShellDetectionError, detect_shell

from lobra.cli import COMMANDS, lobra_app, missing_package
from lobra.commands.output import written
from lobra.common.errors import ConfigError

Shell = Literal["bash", "zsh", "fish", "powershell"]


def install_completion(*, shell: Shell | None = None, output: Path | None = None) -> int:
    """Have the shell complete commands and options; a new shell does.

    Options of commands that cannot run here, for want of packages, are left out.

    Parameters
    ----------
    shell
        By default the one this is called from.
    output
        File to write; by default where the shell looks, and its start-up file is told.

    Raises
    ------
    ConfigError
        If the shell is not known, or the file cannot be written.
    """
    try:
        shell = shell or detect_shell()
    except ShellDetectionError as error:
        raise ConfigError("--shell: which shell this is cannot be seen; name it") from error
    known = {
        name: (path if _is_there(path) else None, line) for name, (path, line) in COMMANDS.items()
    }
    with written("--output", output or Path.home()):
        path = lobra_app(commands=known).install_completion(
            shell=shell, output=output, add_to_startup=output is None
        )
    print(f"written: {path}; open a new {shell} to use it")
    return 0


def _is_there(path: str | None) -> bool:
    """Return whether a command can be imported here; experiments are in a checkout only."""
    module, _, function = (path or "").partition(":")
    try:
        return bool(path) and hasattr(importlib.import_module(module), function)
    except ConfigError:
        return False
    except ModuleNotFoundError as error:
        if missing_package(error) is None:
            raise
        return False
