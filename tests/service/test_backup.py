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
from tests.service.support import Client, deployment_of, logprobs_of, running
from tests.service.test_equality import Trainer, steps_of

pytestmark = pytest.mark.ranks


def test_a_backup_goes_on(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of a step of one model; another is saved over and over meanwhile."""
    state, copy = tmp_path / "state", tmp_path / "copy"
    deployment = deployment_of(base, state, [(1, 1)], 64, precision="fp64")
    first, second = steps_of(0)[:2]
    words = ["backup", str(copy), "--state-dir", str(state)]
    assert main(words) == 2
    assert "no service" in capsys.readouterr().err
    with running(deployment) as found:
        trainer, busy = (Trainer(found.client(name), 0) for name in ("tenant", "busy"))
        trainer.train([first])
        path = trainer.save("save_weights", "a")
        (sent,) = [trainer.client.losses(trainer.model, trainer.next_seq(), second.calls[0])[1]]
        expected = logprobs_of(trainer.client.result(sent))
        is_copied = threading.Event()

        def save() -> None:
            while not is_copied.is_set():
                busy.save("save_weights", "b", overwrite=True)

        saving = threading.Thread(target=save)
        saving.start()
        assert main(words) == 0
        is_copied.set()
        saving.join()
        rest = [(trainer.next_seq(), call) for call in second.calls[1:]]
        expected += [
            own
            for seq_id, call in rest
            for own in logprobs_of(
                trainer.client.result(trainer.client.losses(trainer.model, seq_id, call)[1])
            )
        ]
        key = trainer.client.key
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err
    kept = deployment_of(base, copy, [(1, 1)], 64, precision="fp64")
    for row in Ledger(copy).rows(checkpoints.select()):
        moments = load_file(
            kept.state_folder.checkpoint(CheckpointRow(**row)) / "moments.safetensors"
        )
        assert all(bool(value.isfinite().all()) for value in moments.values())
    with running(kept) as found:
        client = Client(found.port, key)
        again = logprobs_of(client.result(sent))
        for seq_id, call in rest:
            again += logprobs_of(client.result(client.losses(trainer.model, seq_id, call)[1]))
        assert client.asked("weights_info", tinker_path=path)["lora_rank"] == 4
    for one, other in zip(expected, again, strict=True):
        np.testing.assert_array_equal(one, other)
