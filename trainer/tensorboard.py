"""TensorBoard's events of a run: curves of what metrics.jsonl says."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import yaml


class TensorBoard:
    """Writes curves into the run's folder, `tensorboard/`.

    Curves of an earlier attempt at the steps from ``begin`` on are hidden.
    """

    def __init__(self, folder: Path, config: dict[str, Any], begin: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        others = set(threading.enumerate())
        self._events: Any = SummaryWriter(  # type: ignore[no-untyped-call]
            str(folder / "tensorboard"), purge_step=begin
        )
        _keep_silent(set(threading.enumerate()) - others)
        text = yaml.safe_dump(config, sort_keys=False)
        self._events.add_text("config", f"```yaml\n{text}```", begin)

    def write(self, values: dict[str, float], step: int) -> None:
        """Write the curves' values of a step."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

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
