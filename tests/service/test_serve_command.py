"""`lobra serve` refuses before it starts anything, all mistakes at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError, MachineError
from lobra.layout.plan import load_plan
from lobra.model.launch import Interrupted
from lobra.service.deployment import Deployment, prepare_deployment
from lobra.service.ranks import StartRanks
from lobra.service.request import ServeRequest
from lobra.service.server import Service, socket_folder
from tests.trainer.command import write_plan


def serve(base: Path | str, *more: str) -> int:
    return main(["serve", "--model", str(base), "--device", "cpu", "--state-dir", "state", *more])


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    message = capsys.readouterr().err
    for part in expected:
        assert part in message
    assert "Traceback" not in message


def test_all_mistakes_are_told(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan({"dp": 1, "tp": 3, "pp": 1, "max_tokens": 64})
    more = ("--strategy-config", "plan.yaml", "--max-slots", "0", "--time-profile", "none.csv")
    assert serve(base, *more) == 2
    refused(capsys, "3 problems", "--max-slots 0", "tp 3", "none.csv")
    assert not Path("state").exists()
    assert serve("nowhere", "--port", "-1") == 2
    refused(capsys, "2 problems", "nowhere", "--port -1")
    assert serve(base, "--port", "99999999", "--host", "a b") == 2
    refused(capsys, "2 problems", "--port 99999999", "--host a b")
    assert serve(base, "--state-dir", "/proc/none") == 2
    refused(capsys, "--state-dir /proc/none: cannot be used (")
    for taken in (".", str(base), "some"):  # what is not known there would be removed
        Path("some/models/ours").mkdir(parents=True, exist_ok=True)
        assert serve(base, "--state-dir", taken) == 2
        refused(capsys, f"--state-dir {taken}: holds other things; choose a folder of its own")


def test_a_port_or_folder_that_is_taken(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert serve(base, "--port", str(port)) == 2
    refused(capsys, f"--port {port}", "in use")
    assert not Path("state").exists()
    Path("state").mkdir()
    noted = Path("state/deployment.json")
    for content, said in (("[1]", "state/deployment.json: "), ("{}", "lacks 'base_model'")):
        noted.write_text(content)
        assert serve(base, "--port", str(port)) == 2
        refused(capsys, said)
    noted.write_text(json.dumps({"base_model": "another"}))
    assert serve(base, "--port", str(port)) == 2
    refused(capsys, "--state-dir", "another base model")


def test_without_a_plan_there_is_one_replica(base: Path) -> None:
    deployment = prepare_deployment(ServeRequest(str(base), device="cpu"))
    assert str(deployment.run.plan) == "<1,1>x1"
    assert deployment.run.plan.max_tokens == deployment.max_context == 512
    assert deployment.names == (str(base), "base")


def test_a_plan_of_more_gpus_than_there_are(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever plans for several machines is told how to use them."""
    write_plan({"dp": 2, "tp": 1, "pp": 1, "max_tokens": 64})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    request = ServeRequest(str(base), "plan.yaml", device="cuda", memory_budget="1GB")
    with pytest.raises(ConfigError, match="needs 2 GPUs of this machine, which has 1; .*host-file"):
        prepare_deployment(request)
    assert prepare_deployment(request, [1, 1]).run.device == "cuda"
    with pytest.raises(ConfigError, match="has 2 ranks, the hosts take 1"):
        prepare_deployment(request, [1])


def test_it_listens_on_the_first_host(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hosts").write_text("other.invalid slots=1\nlocalhost slots=1\n")
    assert serve(base, "--host-file", "hosts", "--max-slots", "0") == 2
    refused(capsys, "2 problems", "its first host is other.invalid", "--max-slots 0")


def test_hosts_that_do_not_answer_are_told_before_anything_is_started(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lobra.trainer.run_hosts.why_silent", lambda host: f"{host}: unknown")
    write_plan({"dp": 2, "tp": 1, "pp": 1, "max_tokens": 64})
    Path("hosts").write_text("localhost slots=1\nb.invalid slots=1\n")
    assert serve(base, "--host-file", "hosts", "--strategy-config", "plan.yaml") == 2
    refused(capsys, "2 problems", "ssh: localhost: unknown", "ssh: b.invalid: unknown")
    assert not Path("state").exists()


def test_ranks_are_started_again_when_hosts_are_there(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After pauses that grow as long as ranks do not come up, of which no pause is a part."""
    now, done, pauses = [0.0], list[str](), list[float]()

    def pause(pause_s: float) -> bool:
        pauses.append(pause_s)
        now[0] += pause_s
        return False

    def start() -> None:
        done.append("start")
        now[0] += 100.0 if len(pauses) == 8 else 1.0
        raise Interrupted(signal.SIGTERM) if len(pauses) == 9 else MachineError("a host is lost")

    service = Service(prepare_deployment(ServeRequest(str(base), device="cpu")), "127.0.0.1", 0)
    monkeypatch.setattr(service, "_serves", True)
    monkeypatch.setattr(service._stopped, "wait", pause)
    monkeypatch.setattr("lobra.service.server.time.monotonic", lambda: now[0])
    service._keep_ranks(start, lambda: done.append("hosts are there"))
    assert done == ["start", *["hosts are there", "start"] * 9]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 1.0]
    service.socket.close()


def test_a_signal_ends_a_service_that_waits_for_hosts(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MachineError("a host is lost")

    told: list[int] = []
    service = Service(prepare_deployment(ServeRequest(str(base), device="cpu")), "127.0.0.1", 0)
    monkeypatch.setattr(service, "_serves", True)
    monkeypatch.setattr(service._stopped, "wait", lambda _s: False)
    service._keep_ranks(fail, lambda: os.kill(os.getpid(), signal.SIGTERM), told.append)
    assert told == [signal.SIGTERM]
    service.socket.close()


@pytest.mark.parametrize(
    ("silent", "plan", "chosen"),
    [
        ((), "<2,1>x1 <1,1>x2", "localhost:0,1@b.invalid:0,1"),
        (("c.invalid",), "<2,1>x1 <1,1>x2", "localhost:0,1@b.invalid:0,1"),
        (("b.invalid",), "<2,1>x1 <1,1>x1", "localhost:0,1@c.invalid:0"),
        (("b.invalid", "c.invalid"), "<2,1>x1", "localhost:0,1"),
    ],
)
def test_hosts_that_are_not_back_in_time_are_left_out(
    silent: tuple[str, ...], plan: str, chosen: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks are started on a plan for the others, which says itself what is kept."""
    commands: list[Sequence[str]] = []
    found: list[Deployment | None] = []

    class Losing(Service):
        def __init__(self, deployment: Deployment, host: str, _port: int) -> None:
            super().__init__(deployment, host, 0)

        def run(
            self, ready: object, on_signal: object, start: StartRanks,
            after_failure: Callable[[], Deployment | None],
        ) -> None:  # fmt: skip
            found.append(after_failure())
            start("address", b"key", None)
            self.socket.close()

    monkeypatch.setattr("lobra.service.server.Service", Losing)
    monkeypatch.setattr("lobra.trainer.run_hosts.why_silent", lambda _host: None)
    monkeypatch.setattr("lobra.trainer.run_hosts.answers", lambda host: host not in silent)
    monkeypatch.setattr(
        "lobra.service.ranks.run_launcher", lambda command, _told: commands.append(command) or 0
    )
    write_plan(
        {"dp": 1, "tp": 2, "pp": 1, "max_tokens": 128},
        {"dp": 2, "tp": 1, "pp": 1, "max_tokens": 64},
    )
    Path("hosts").write_text("localhost slots=2\nb.invalid slots=2\nc.invalid slots=1\n")
    words = ["--strategy-config", "plan.yaml", "--host-file", "hosts", "--memory", "lean"]
    words += ["--await-hosts", "0"]
    monkeypatch.setattr("sys.argv", ["lobra", "serve", *words])
    assert serve(base, *words) == 0
    (command,), (deployment,) = commands, found
    assert deployment is not None
    groups = deployment.run.plan.groups
    assert {group.layout.memory for group in groups} == {"lean"}
    assert " ".join(f"<{g.layout.tp},{g.layout.pp}>x{g.replicas}" for g in groups) == plan
    assert command[command.index("--include") + 1] == chosen
    if "b.invalid" in silent:
        (smaller,) = (word for word in command if word.endswith("state/plan.yaml"))
        assert load_plan(smaller) == deployment.run.plan
        assert "--memory" not in command


@pytest.mark.parametrize("more", [(), ("--host-file", "hosts")])
def test_how_a_launched_service_goes_on_is_said_by_one(
    base: Path,
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a host file, the service's own process starts the ranks again."""

    def fail(*arguments: object) -> None:
        assert (arguments[-1] is None) == bool(more), "the watches say it or not, too"
        raise MachineError("host b is lost")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("lobra.trainer.run.run_in_launcher", fail)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        serve(base, *more)
    said = capsys.readouterr().err
    assert "host b is lost\n" in said
    assert ("start the service again: what tenants have sent" in said) == (not more)


def test_the_socket_of_a_service_that_was_killed_is_removed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one of the same state folder, which nobody else can use then."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for state in ("ours", "theirs"):
        hold = "import time; from pathlib import Path; "
        hold += "from lobra.service.server import socket_folder\n"
        hold += f"with socket_folder(Path({state!r})): print(flush=True); time.sleep(60)"
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        killed = subprocess.Popen(
            [sys.executable, "-c", hold], stdout=subprocess.PIPE, env=environment
        )
        assert killed.stdout and killed.stdout.readline()
        killed.kill()
        killed.communicate()
    assert len(list(tmp_path.glob("lobra-service-*"))) == 2
    with socket_folder(Path("ours")) as folder:
        kept = {path.parent for path in tmp_path.glob("lobra-service-*/state-dir")}
        assert len(kept) == 2 and Path(folder) in kept
    (left,) = tmp_path.glob("lobra-service-*")
    assert (left / "state-dir").read_text() == "theirs"
