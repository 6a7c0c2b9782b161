"""The doctor asks two nodes by ssh: what is well, and whatever may be wrong, with a remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lobra.cli import main
from lobra.commands import doctor
from lobra.commands.finding import LACKS, NOTE, OK, Finding
from lobra.common.errors import ConfigError
from lobra.common.options import LauncherOptions
from tests.assets.golden import HERE as GOLDEN
from tests.machines.nodes import INTERFACE, Node, two_nodes, write_ssh

#: On the second node only: another version of torch, and a clock that is an hour ahead.
OTHER_MACHINE = """
import importlib.metadata, platform, time
if platform.node() == "node2":
    found, now = importlib.metadata.version, time.time
    importlib.metadata.version = lambda name: "1.0" if name == "torch" else found(name)
    time.time = lambda: now() + 3600
"""


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Node, Node]]:
    """Two nodes, this folder on both, and a host file with their names."""
    monkeypatch.chdir(tmp_path)
    with two_nodes(tmp_path, {"node1": "", "node2": ""}) as made:
        write_ssh(tmp_path / "bin", made)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin")
        monkeypatch.setenv("PYTHONPATH", str(Path(doctor.__file__).parents[2]))
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        Path("hosts").write_text("node1 slots=3\nnode2 slots=3\n")
        yield made


def found(
    output_dir: str | None = None, model: str | None = None, **options: object
) -> dict[str, Finding]:
    """Return what the doctor finds, by subject."""
    launcher = LauncherOptions(host_file=Path("hosts"), **options)  # type: ignore[arg-type]
    folder = None if output_dir is None else Path(output_dir)
    findings = doctor.examine(model, None, None, launcher, None, folder)
    return {finding.subject: finding for finding in findings}


def lacking(findings: dict[str, Finding]) -> dict[str, str]:
    return {subject: one.text for subject, one in findings.items() if one.status == LACKS}


def test_hosts_that_lack_nothing(
    nodes: tuple[Node, Node], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = found("runs/a", server_addr="node1", server_port=29511)
    assert lacking(findings) == {}
    assert findings["host node2"].text.startswith("3 slots, ")
    assert findings["host node2"].text.partition(" at ")[2].startswith("10.77.0.2")
    assert findings["versions"].text.endswith("python, lobra, torch, deepspeed, transformers")
    assert findings["port"].text == "node1:29511 is free, and all hosts reach it"
    assert findings["clocks"].status == findings["link node1-node2"].status == OK
    assert findings["exchange"].text.startswith("100 MB of adapters take about ")
    assert findings["--output-dir"].text == "runs/a: shared by all hosts"
    assert [path.name for path in Path().iterdir() if "doctor" in path.name] == []

    monkeypatch.setenv("COLUMNS", "200")
    more = ["--model", "7B", "--trainer-config", "exp_task6", "--strategy-config", "plan.yaml"]
    Path("plan.yaml").write_text(
        "strategy_config: [{dp: 1, tp: 2, pp: 1, max_tokens: 64}, "
        "{dp: 2, tp: 1, pp: 1, max_tokens: 64}]\nmeta: {step_time_s: 4.2}\n"
    )
    assert main(["doctor", "--host-file", "hosts", *more]) == 0
    shown = capsys.readouterr().out
    assert "fits nodes of 3, 1 GPUs" in shown
    assert "MB of adapters take about" in shown and "(the plan's takes 4.2 s)" in shown


def test_each_thing_that_is_wrong_has_a_line(nodes: tuple[Node, Node]) -> None:
    first, second = nodes
    Path("other").mkdir()
    Path("other/sitecustomize.py").write_text(OTHER_MACHINE)
    Path("env.sh").write_text('export PYTHONPATH="$PWD/other:$PYTHONPATH"\n')
    Path("runs").mkdir()
    second.hide(Path("runs").resolve())
    shutil.copytree(GOLDEN / "base", "base")
    second.hide(Path("base").resolve())
    taken = "import socket; s = socket.create_server(('', 29512)); print(flush=True); input()"
    with subprocess.Popen(
        first.command([sys.executable, "-c", taken]), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as listener:
        assert listener.stdout is not None
        listener.stdout.readline()
        findings = found("runs/a", "base", env_file=Path("env.sh"), server_port=29512)
        listener.kill()
    wrong = lacking(findings)
    assert (
        wrong.pop("port") == "29512 on node1: Address already in use; give another by --server-port"
    )
    assert wrong.pop("torch").startswith("1.0 on node2, ")
    assert wrong.pop("clock of node2").startswith("3600 s ahead of this machine's; have NTP")
    assert wrong.pop("weights").startswith("not on node2: ")
    assert wrong == {}
    output = findings["--output-dir"]
    assert output.status == NOTE
    assert output.text == "runs/a: not shared with node2; node1, the host of rank 0, has all"
    wrong = lacking(found("/proc/runs"))
    assert wrong["--output-dir"].startswith("/proc/runs: node1 cannot write there (")


def test_hosts_that_do_not_reach_each_other(nodes: tuple[Node, Node]) -> None:
    Path("env.sh").write_text(
        f"export GLOO_SOCKET_IFNAME=$([[ $(uname -n) == node1 ]] && echo {INTERFACE} || echo lo)\n"
    )
    wrong = lacking(found(env_file=Path("env.sh"), server_addr="10.99.0.1"))
    assert wrong.pop("port") == (
        "node2 does not reach node1 at 10.99.0.1:29500 (Network is unreachable); open the "
        "firewall, or give an address that it knows by --server-addr"
    )
    assert "127.0.0.1, where others cannot reach it" in wrong.pop("address of node2")
    assert wrong == {}
    Path("env.sh").write_text("export GLOO_SOCKET_IFNAME=eth7\n")
    wrong = lacking(found(env_file=Path("env.sh")))
    assert wrong == dict.fromkeys(
        ("host node1", "host node2"), "GLOO_SOCKET_IFNAME=eth7: No such device"
    )


def test_hosts_that_do_not_answer(
    nodes: tuple[Node, Node], capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("hosts").open("a") as hosts:
        hosts.write("node3 slots=3\n")
    wrong = lacking(found())
    assert list(wrong) == ["host node3"]
    assert "Could not resolve hostname node3" in wrong["host node3"]
    assert "see that `ssh node3 true` works without a password" in wrong["host node3"]
    Path("hosts").write_text("node3 slots=3\n")
    assert main(["doctor", "--host-file", "hosts"]) == 1
    assert "lacks" in capsys.readouterr().out


def test_mistakes_of_options_come_first() -> None:
    with pytest.raises(ConfigError) as caught:
        found(server_port=99999, server_addr="-x", env_file=Path("no-such-file"))
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == [
        "--server-addr", "--server-port", "hosts:", "--env-file"
    ]  # fmt: skip
