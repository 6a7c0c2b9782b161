"""What the command line says goes before what the environment does."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lobra.trainer import run as run_module
from lobra.trainer.run import start_ranks


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_compute_on_the_device_of_the_run(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "mps")
    given: dict[str, Any] = {}
    monkeypatch.setattr(run_module, "run_ranks", lambda *_, **options: given.update(options))
    run: Any = SimpleNamespace(
        device=device, world_size=1, hang_timeout_s=None, output_dir=Path("run")
    )
    start_ranks(run, "some:target", {}, None)
    assert given["device"] == device
    assert given["environment"] == {"DS_ACCELERATOR": device}
    assert os.environ["DS_ACCELERATOR"] == device
