"""What launchers, terminals and file systems do to a run: signals, locks, one host's mistakes."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from platform import node

import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError, MachineError
from lobra.trainer.launcher import run_launcher
from lobra.trainer.run import Refusal
from lobra.trainer.run_folder import hold_folder
from lobra.trainer.signals import SAME_REQUEST_S, StopRequest


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

    def fail(*_: object) -> None:
        raise pickle.loads(pickle.dumps(error))  # as it comes from another rank

    def leave(number: int) -> None:
        left.append(number)
        raise SystemExit(number)

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("lobra.trainer.run.train_in_launcher", fail)
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


@pytest.mark.parametrize(
    ("rank", "more", "is_said"), [(0, (), True), (1, (), False), (0, ("--host-file=hosts",), False)]
)
def test_how_a_launched_run_goes_on_is_said_by_one(
    rank: int, more: tuple[str, ...], is_said: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With a host file that is who started the launcher, and goes on by itself if it may."""
    remedies: list[object] = []

    def fail(_request: object, remedy: object) -> None:
        remedies.append(remedy)
        raise MachineError("host b is lost")

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("lobra.trainer.run.train_in_launcher", fail)
    monkeypatch.setattr(os, "_exit", sys.exit)
    arguments = [f"--{name}={tmp_path}" for name in
                 ("model", "trainer-config", "strategy-config", "output-dir")]  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        main(["train", *arguments, *more])
    said = f"no checkpoint was saved in {tmp_path}: begin anew, with the same command\n"
    assert capsys.readouterr().err.endswith(said if is_said else "host b is lost\n")
    assert (remedies == [None]) == bool(more), "the watches say it or not, too"


# Like deepspeed's on one host: the ranks are grandchildren. "passes" hands a signal on and waits,
# "dies" leaves the ranks to themselves.
LAUNCHER = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[2]])
if sys.argv[1] == "passes":
    signal.signal(signal.SIGINT, lambda number, frame: rank.send_signal(number))
    signal.signal(signal.SIGTERM, lambda number, frame: rank.send_signal(number))
else:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
sys.exit(rank.wait())
"""
RANK = """
import os, pathlib, signal, sys, time
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(number))
pathlib.Path("pid").write_text(str(os.getpid()))
while not told or pathlib.Path("stubborn").exists():
    time.sleep(0.05)
time.sleep(0.5)
pathlib.Path("saved").write_text(str(told[0]))
sys.exit(7)
"""


def start(folder: Path, kind: str) -> subprocess.Popen[bytes]:
    """Start run_launcher in a process of its own; return it when its rank runs."""
    code = "import sys; from lobra.trainer.launcher import run_launcher; "
    code += "sys.exit(run_launcher([sys.executable, *sys.argv[1:]]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, "-c", LAUNCHER, kind, RANK], cwd=folder, env=environment,
        start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


def runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("kind", ["passes", "dies"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_launcher_is_told_and_waited_for(
    kind: str, number: int, code: int, tmp_path: Path
) -> None:
    process = start(tmp_path, kind)
    os.killpg(process.pid, number)  # as a terminal does: to the whole group
    assert process.wait(timeout=60) == code
    assert (tmp_path / "saved").read_text() == str(int(number)), "the rank was let finish"


def test_a_second_request_kills_the_launcher_and_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "stubborn").touch()
    process = start(tmp_path, "passes")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # the same request still
    time.sleep(SAME_REQUEST_S)
    rank = int((tmp_path / "pid").read_text())
    assert process.poll() is None
    assert runs(rank)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not runs(rank)
    assert not (tmp_path / "saved").exists()


def test_the_exit_code_of_a_launcher() -> None:
    assert run_launcher(["sh", "-c", "exit 5"]) == 5
    assert run_launcher(["sh", "-c", "kill -9 $$"]) == 137
