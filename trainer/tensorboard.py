"""TensorBoard's events of a run: curves of what metrics.jsonl says."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import yaml

VALUES_A_STRIDE = 200_000  # some 15 MB
SPARSE = "validation_loss/"  # of what is not measured in every step


class TensorBoard:
    """Writes curves into the run's folder, `tensorboard/`.

    Curves of an earlier attempt at the steps from ``begin`` on are hidden. After every
    `VALUES_A_STRIDE` values only half as many steps are written as before, so that files grow with
    the logarithm of the steps; TensorBoard shows a thousand points of a curve. Curves that have no
    value in most steps are written whole.
    """

    def __init__(self, folder: Path, config: dict[str, Any], begin: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        others = set(threading.enumerate())
        self._events: Any = SummaryWriter(  # type: ignore[no-untyped-call]
            str(folder / "tensorboard"), purge_step=begin
        )
        _keep_silent(set(threading.enumerate()) - others)
        self._stride = 1
        self._left = VALUES_A_STRIDE
        text = yaml.safe_dump(config, sort_keys=False)
        self._events.add_text("config", f"```yaml\n{text}```", begin)

    def write(self, values: dict[str, float], step: int) -> None:
        """Write the curves' values of a step."""
        if step % self._stride:
            values = {name: value for name, value in values.items() if name.startswith(SPARSE)}
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._left -= len(values)
        if self._left <= 0:
            self._stride *= 2
            self._left = VALUES_A_STRIDE

    def close(self, failed: bool) -> None:
        """Write what is still in memory; events do not say how a run ended."""
        self._events.close()


def _keep_silent(threads: set[threading.Thread]) -> None:
    """Have these threads end without a traceback; the next `write` raises what they died of."""
    plain = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        if died.thread not in threads:
            plain(died)

    threading.excepthook = hook
