"""What launchers, terminals and file systems do to a run: signals, locks, one host's mistakes."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import time
from pathlib import Path
from platform import node

import pytest

from tasks.config import TaskConfig
from tasks.errors import ConfigError
from tests.model.support import save_llama
from tests.trainer.support import make_plan, make_run, random_dataset
from trainer.cli import main
from trainer.folder_lock import hold_folder
from trainer.run import Refusal, check_shared
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


@pytest.mark.parametrize(
    ("rank", "error", "code", "said"),
    [
        (0, Refusal("--precision fp7: none"), 2, "lobra: --precision fp7: none\n"),
        (1, Refusal("--precision fp7: none"), 2, ""),
        (1, ConfigError("run/data: damaged"), 2, f"lobra: rank 1 on {node()}: run/data: damaged\n"),
        (0, ConfigError("run/data: damaged"), 2, f"lobra: rank 0 on {node()}: run/data: damaged\n"),
        (1, ValueError("odd"), 1, "ValueError: odd\n"),
    ],
)
def test_a_mistake_under_a_launcher_is_said_by_who_knows_it(
    rank: int, error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    left: list[int] = []

    def fail(_request: object) -> None:
        raise pickle.loads(pickle.dumps(error))  # as it comes from another rank

    def leave(number: int) -> None:
        left.append(number)
        raise SystemExit(number)

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("trainer.train_cli.train_in_launcher", fail)
    monkeypatch.setattr(os, "_exit", leave)
    arguments = [f"--{name}=x" for name in
                 ("model", "trainer-config", "strategy-config", "output-dir")]  # fmt: skip
    alone = not isinstance(error, Refusal)
    try:
        assert main(["train", *arguments]) == code
    except SystemExit:
        assert left == [code]
    assert bool(left) == alone, "found by one rank alone: out at once, without clean-up"
    message = capsys.readouterr().err
    assert message.endswith(said) if said else not message


def test_a_host_that_does_not_share_the_run_folder(tmp_path: Path) -> None:
    data = [random_dataset(3, 6, 20, 256, 0)]
    task = TaskConfig("one", 2, 4.0, ("q_proj",), 2, dataset_name="random", context_length=64)
    base = save_llama(tmp_path / "base")
    run = make_run(tmp_path / "run", base, (task,), data, make_plan([(1, 1)], 64), 1)
    check_shared(run)
    run.data_folder(0).rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="one: not on this host.*file system all hosts share"):
        check_shared(run)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="run: not on this host.*file system all hosts share"):
        check_shared(run)
