"""One Ctrl-C is one request, however many signals it makes; locks where there are none."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from tasks.errors import ConfigError
from trainer.folder_lock import hold_folder
from trainer.signals import SAME_REQUEST_S, StopRequest


def test_the_terminal_and_the_launcher_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    deaths: list[int] = []
    kill, own = os.kill, os.getpid()
    with StopRequest() as stop:
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        kill(own, signal.SIGINT)
        now[0] += 0.01
        kill(own, signal.SIGTERM)
        assert stop.received == signal.SIGINT, "still alive, and the first one counts"
        now[0] += SAME_REQUEST_S
        monkeypatch.setattr(os, "kill", lambda _pid, number: deaths.append(number))
        kill(own, signal.SIGTERM)
        assert deaths == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    hold_folder(tmp_path)
    assert f"cannot lock ({os.strerror(number)})" in caplog.text


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])
def test_a_held_folder_is_refused(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(ConfigError, match="another run is writing to it"):
        hold_folder(tmp_path)
