"""A service whose ranks are on two nodes, of which one is lost, or is back: PEFT's adapters.

The nodes are network namespaces (`tests.machines.nodes`); only the first sees the state folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lobra.service.ledger import Ledger
from lobra.service.state_folder import StateFolder
from tests.machines.nodes import INTERFACE, Node, clean_environment, two_nodes, write_ssh
from tests.machines.service_client import TENANT
from tests.model.support import save_family
from tests.service.peft_alone import train_with_peft
from tests.service.test_equality import BAR, FLOAT32_BAR, steps_of

pytestmark = [pytest.mark.ranks, pytest.mark.long]

PORT = 8123
#: A pipeline over both nodes, and a replica on each.
PLAN = """strategy_config:
- {dp: 1, tp: 1, pp: 2, max_tokens: 128}
- {dp: 2, tp: 1, pp: 1, max_tokens: 64}
meta: {ranks: [[[0], [2]], [[1]], [[3]]]}
"""
SERVE = (
    "serve", "--model", "base", "--strategy-config", "plan.yaml", "--state-dir", "state/here",
    "--device", "cpu", "--precision", "fp64", "--port", str(PORT),
)  # fmt: skip


@pytest.fixture
def nodes(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Node, Node]]:
    """Two nodes with the model and the plan, the second one with an empty state folder."""
    save_family("qwen3", tmp_path / "base", num_hidden_layers=2)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "state").mkdir()
    (tmp_path / "env.sh").write_text(f"export GLOO_SOCKET_IFNAME={INTERFACE}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(project_root))
    with two_nodes(tmp_path, {"node1": "", "node2": ""}) as made:
        write_ssh(tmp_path / "bin", made)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        made[1].hide(tmp_path / "state")
        yield made


class Served:
    """`lobra serve` on a node, and what it says."""

    def __init__(self, commands: Sequence[Sequence[str]], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.processes = [
                subprocess.Popen(
                    command,
                    env=clean_environment(GLOO_SOCKET_IFNAME=INTERFACE),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
                for command in commands
            ]

    def wait_for(self, text: str, times: int = 1) -> str:
        """Wait until it has said something so often; return all it has said."""
        deadline = time.monotonic() + 240
        while (said := self.log.read_text()).count(text) < times:
            assert time.monotonic() < deadline, said
            assert self.processes[0].poll() is None, said
            time.sleep(0.1)
        return said

    def key(self) -> str:
        said = self.wait_for("TINKER_BASE_URL")
        return next(line.split()[-1] for line in said.splitlines() if "shown once" in line)

    def stop(self) -> int:
        """Ask it to end; return its exit code."""
        self.processes[0].send_signal(signal.SIGTERM)
        return self.processes[0].wait(120)


def client_on(node: Node, key: str) -> subprocess.Popen[str]:
    """Start the tenant's program on a node."""
    words = [sys.executable, "-m", "tests.machines.service_client", str(PORT), key]
    return subprocess.Popen(
        node.command(words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def check(told: dict, folder: Path) -> None:
    """Compare what a tenant was told, and what was saved, with PEFT."""
    ledger, kept = Ledger(Path("state/here")), StateFolder(Path("state/here"))
    start, *ends = (ledger.checkpoint(path) for path in (told["start"], *told["ends"]))
    assert start is not None
    tensors, logprobs = train_with_peft(
        Path("base"), kept.checkpoint(start), steps_of(TENANT), folder / "peft"
    )
    for mine, theirs in zip(told["logprobs"], logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=FLOAT32_BAR, atol=FLOAT32_BAR)
    for end in ends:
        assert end is not None
        own = load_file(kept.checkpoint(end) / "adapter_model.safetensors")
        for name, value in tensors.items():
            torch.testing.assert_close(own[name], value, rtol=BAR, atol=BAR)


@pytest.mark.parametrize("is_back", [True, False])
def test_a_node_that_is_lost_costs_nothing_but_time(
    is_back: bool, nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Started by a host file; without the node, the pipeline is on the one that is left."""
    first, second = nodes
    Path("hosts.txt").write_text("node1 slots=2\nnode2 slots=2\n")
    hosts = ["--host-file", "hosts.txt", "--env-file", "env.sh", "--server-addr", "node1"]
    hosts += ["--await-hosts", "240" if is_back else "0"]
    command = first.command([sys.executable, "-m", "lobra", *SERVE, *hosts])
    served = Served([command], tmp_path / "served")
    try:
        client = client_on(first, served.key())
        assert client.stdout is not None and client.stdin is not None
        assert client.stdout.readline() == "waiting\n"
        second.pull_the_cable()
        client.stdin.write("go on\n")
        client.stdin.flush()
        said = served.wait_for("requests wait, the ranks are started again")
        assert "host node2 with ranks 2 to 3 is lost: nothing is heard of it on node1" in said
        if is_back:
            served.wait_for("waiting for what does not answer by ssh: host node2")
            second.plug_it_in()
        else:
            said = served.wait_for("the service goes on on <1,2>x1 instead of <1,2>x1 <1,1>x2")
            assert "host node2 (2 GPUs) is lost: the service goes on" in said
        told = json.loads(client.stdout.readline())
        assert served.stop() == 143
    finally:
        for process in served.processes:
            process.kill()
    check(told, tmp_path)
    there = subprocess.run(second.command(["ls", "-A", "state"]), capture_output=True, text=True)
    assert there.stdout == "", "the other node has written nothing"


def test_torchrun_starts_it_too(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launcher += ["--nproc-per-node", "2", "--master-addr", "node1", "--master-port", "29501"]
    commands = [
        node.command([*launcher, "--node-rank", str(number), "-m", "lobra", *SERVE])
        for number, node in enumerate(nodes)
    ]
    served = Served(commands, tmp_path / "served")
    try:
        client = client_on(nodes[0], served.key())
        told = json.loads(client.communicate("go on\n")[0].splitlines()[-1])
        served.stop()
        assert "SIGTERM: ending after the pass in progress" in served.log.read_text()
        assert served.processes[1].wait(60) is not None
    finally:
        for process in served.processes:
            process.kill()
    check(told, tmp_path)
