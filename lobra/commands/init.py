"""`lobra init`: a task file to start from, every field explained."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from lobra.common.errors import ConfigError
from lobra.common.files import write_atomic

TEMPLATE = Path(__file__).with_name("template.yaml")
DEFAULT_PATH = Path("tasks.yaml")

NEXT = """\
{path}: four tasks of the embedded data, every field explained (as in docs/tasks.md).
Edit it, or try it as it is, on the tiny model and four processes of a CPU:
  lobra profile time --model tiny --tp 1,2 --device cpu --max-seq-length 2048 \\
      --trainer-config {quoted}
  lobra profile memory --model tiny --num-gpus 4 --device cpu --memory-budget 84MB \\
      --max-seq-length 2048 --trainer-config {quoted}
  lobra plan --model tiny --num-gpus 4 --max-seq-length 2048 --trainer-config {quoted} \\
      --strategy-config first
  lobra train --model tiny --device cpu --trainer-config {quoted} --strategy-config first \\
      --output-dir runs/first"""


def init(path: Path = DEFAULT_PATH, /, *, force: bool = False) -> int:
    """Write a task file with every field explained, and say what to do with it.

    Parameters
    ----------
    path
        The YAML file to write.
    force
        Replace a file that is there.

    Raises
    ------
    ConfigError
        If there is such a file already, or it cannot be written.
    """
    if path.suffix == ".json":
        raise ConfigError(f"{path}: the file is YAML, want a name that ends in .yaml or .yml")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder, want the name of a file such as {path / 'a.yaml'}")
    if os.path.lexists(path) and not force:
        raise ConfigError(f"{path}: is there already; give another path, or --force to replace it")
    try:
        write_atomic(path, TEMPLATE.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    print(NEXT.format(path=path, quoted=shlex.quote(str(path))))
    return 0
