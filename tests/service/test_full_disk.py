"""A full disk ends nothing: who sends is told to wait, what is done is noted when there is room."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from lobra.common.storage import StorageError
from lobra.service import ledger as ledger_module
from lobra.service import seats
from lobra.service.ledger import Ledger
from lobra.service.tables import sessions
from lobra.service.wire import Datum
from tests.service.support import deployment_of, running

ROW = {"tenant": "alice", "created_at": 0.0}
LARGE = "x" * 100_000
TOKENS = np.arange(3, 12, dtype=np.int32)


class Disk:
    """Where a ledger is; while it is full its file does not grow."""

    def __init__(self, ledger: Ledger) -> None:
        self.is_full = True
        sa.event.listen(ledger.engine, "checkout", self._limit)

    def _limit(self, connection: Any, _record: Any, _proxy: Any) -> None:
        pages = 1 if self.is_full else 1 << 30  # SQLite keeps those there are
        connection.execute(f"PRAGMA max_page_count = {pages}")


def test_who_can_wait_writes_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.01)
    ledger = Ledger(tmp_path)
    over = threading.Event()
    patient = ledger.patient(over.is_set)
    disk = Disk(ledger)
    said = r"ledger.sqlite: SQLite cannot use it \(database or disk is full\); make room for it"
    with pytest.raises(StorageError, match=said):
        ledger.insert(sessions, {"id": LARGE, **ROW})
    large = sessions.insert().values(id=LARGE, **ROW)
    with pytest.raises(StorageError, match=said):
        ledger.execute(large)
    waiting = threading.Thread(target=patient.execute, args=(large,))
    waiting.start()
    deadline = time.monotonic() + 10
    while "waits to be noted" not in caplog.text:
        assert time.monotonic() < deadline
    assert waiting.is_alive()
    disk.is_full = False
    waiting.join(10)
    assert ledger.tenant_of_session(LARGE) == "alice"
    over.set()
    disk.is_full = True
    with pytest.raises(StorageError, match=said):
        patient.execute(sessions.insert().values(id=2 * LARGE, **ROW))


@pytest.mark.ranks
def test_who_sends_is_told_to_wait(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is trained without snapshots meanwhile; its ranks go on."""
    monkeypatch.setattr(seats, "SNAPSHOT_UPDATES", 1)
    deployment = deployment_of(base, tmp_path / "state", [(1, 1)], 64)
    with running(deployment) as found:
        client = found.client("tenant")
        session = client.new_session()
        disk = Disk(found.service.ledger)
        body = {"session_id": session, "model_seq_id": 0, "base_model": "base"}
        metadata = {"note": LARGE[:60_000]}
        status, answer = client.post("create_model", user_metadata=metadata, **body)
        assert status == 503
        assert answer["detail"].startswith("the service cannot write down what is sent, its disk")
        disk.is_full = False
        future = client.asked("create_model", user_metadata=metadata, **body)
        model = str(client.result(future)["model_id"])

        def snapshot_after(seq_id: int) -> int:
            client.losses(model, seq_id, [Datum(TOKENS, TOKENS, np.ones(len(TOKENS)))])
            step = {"model_id": model, "seq_id": seq_id + 1, "adam_params": {}}
            client.result(client.asked("optim_step", **step))
            saved = {"model_id": model, "seq_id": seq_id + 2, "path": "one", "overwrite": True}
            answer = client.result(client.asked("save_weights", **saved))
            assert ("error" in answer) == (free == 0)
            assert answer.get("category") == ("server" if free == 0 else None)
            found_model = found.service.ledger.model(model)
            assert found_model is not None
            return found_model.snapshot_seq

        free = 0
        monkeypatch.setattr(seats, "free_bytes", lambda path: free)
        assert snapshot_after(1) == -1
        free = 1 << 40
        assert snapshot_after(4) == 5
        assert not found.crashed
        assert found.service.coordinator.missing_ranks is None
