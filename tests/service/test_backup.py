"""A backup that is made while models are trained goes on from where they were."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from lobra.cli import main
from lobra.service.ledger import Ledger
from lobra.service.tables import CheckpointRow, checkpoints
from lobra.service.wire import Datum
from tests.service.support import Client, Running, deployment_of, logprobs_of, running
from tests.service.test_equality import FLOAT32_BAR, Trainer, steps_of

pytestmark = pytest.mark.ranks


def losses(trainer: Trainer, calls: list[tuple[int, tuple[Datum, ...]]]) -> list[np.ndarray]:
    """Return the logprobs of numbered calls."""
    client = trainer.client
    return [
        own
        for seq_id, call in calls
        for own in logprobs_of(client.result(client.losses(trainer.model, seq_id, call)[1]))
    ]


def test_a_backup_goes_on(
    base: Path, mixed: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under another plan, from the middle of a step; another model is saved over and over."""
    state, copy = mixed.service.deployment.state_folder.path, tmp_path / "copy"
    assert main(["backup", str(copy), "--state-dir", str(tmp_path)]) == 2
    assert "no service" in capsys.readouterr().err
    words = ["backup", str(copy), "--state-dir", str(state)]
    first, second = steps_of(0)[:2]
    trainer, busy = (Trainer(mixed.client(name), 0) for name in ("backed-up", "busy"))
    trainer.train([first])
    path = trainer.save("save_weights", "a")
    calls = [(trainer.next_seq(), call) for call in second.calls]
    expected = losses(trainer, calls[:1])
    is_copied = threading.Event()

    def save() -> None:
        while not is_copied.is_set():
            busy.save("save_weights", "b", overwrite=True)

    saving = threading.Thread(target=save)
    saving.start()
    try:
        assert main(words) == 0
    finally:
        is_copied.set()
        saving.join()
    expected += losses(trainer, calls[1:])
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    kept = deployment_of(base, copy, [(1, 1)], 64, precision="fp64")
    for row in Ledger(copy).rows(checkpoints.select().where(checkpoints.c.kind == "weights")):
        folder = kept.state_folder.checkpoint(CheckpointRow(**row))
        moments = load_file(folder / "moments.safetensors")
        assert all(bool(value.isfinite().all()) for value in moments.values())
    with running(kept) as found:
        trainer.client = Client(found.port, trainer.client.key)
        again = losses(trainer, calls)  # the first of which the backup has the result of
        assert trainer.client.asked("weights_info", tinker_path=path)["lora_rank"] == 4
    for one, other in zip(expected, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=FLOAT32_BAR)
