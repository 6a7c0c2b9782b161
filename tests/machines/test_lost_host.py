"""A host that is lost is named by the others, in seconds; the run goes on with or without it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lobra.cli import main
from lobra.trainer.metrics import read_metrics
from lobra.trainer.replanner import read_replans
from tests.assets.golden.make import training_arguments
from tests.machines.nodes import INTERFACE, Node, clean_environment, write_ssh
from tests.machines.test_nodes import arguments
from tests.trainer.test_launchers import adapters

pytestmark = [pytest.mark.ranks, pytest.mark.long]

STEPS = 600
#: Of a host that was writing when it last noted anything, much is borne, and notes are a second
#: apart: so many steps (of 20 ms) are several times longer than what `await_checkpoint` waits.
SAVE_EVERY = 300
HANG_TIMEOUT_S = 10
PATIENCE_S = 240.0


@pytest.fixture(autouse=True)
def long_tasks(place: Path) -> None:
    """More steps than it takes to strike, on a rank for each node."""
    Path("plan.yaml").write_text("strategy_config: [{dp: 2, tp: 1, pp: 1, max_tokens: 256}]\n")
    content = json.loads(Path("tasks.json").read_text())
    for task in content["task"]:
        task["steps"] = STEPS
        # Hundreds of large steps of Adam enlarge what rounding does on another plan to anything.
        task["learning_rate"] /= 100
    Path("tasks.json").write_text(json.dumps(content))


def started(command: list[str], said: str, **variables: str) -> subprocess.Popen[bytes]:
    with Path(said).open("w") as file:
        return subprocess.Popen(
            command, env=clean_environment(**variables), stdout=file, stderr=subprocess.STDOUT
        )


def await_checkpoint(*running: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not list(Path("runs/a").glob("checkpoints/step_*/state.json")):
        assert all(one.poll() is None for one in running), "ended before a checkpoint"
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(1.5)  # for hosts to note that they train again


def kill_all(node: Node) -> None:
    for pid in node.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("lose", [kill_all, Node.pull_the_cable])
def test_it_is_named(
    lose: Callable[[Node], None], place: Path, nodes: tuple[Node, Node], project_root: Path
) -> None:
    """By torchrun, whose own timeouts are minutes."""
    words = ["bash", str(project_root / "examples/torchrun.sh"), *arguments()]
    words += ["--save-every", str(SAVE_EVERY), "--hang-timeout", str(HANG_TIMEOUT_S)]
    common = {"NODES": "2", "RANKS": "1", "FIRST": "lobra-0", "RUN": "runs/a"}
    common["GLOO_SOCKET_IFNAME"] = INTERFACE
    running = [
        started(node.command(words), f"said-{rank}.txt", NODE_RANK=str(rank), **common)
        for rank, node in enumerate(nodes)
    ]
    await_checkpoint(*running)
    lose(nodes[1])
    codes = [one.wait(PATIENCE_S) for one in running]
    assert all(codes)
    said = [Path(f"said-{rank}.txt").read_text() for rank in range(2)]
    assert len(re.findall("host lobra-1 with rank 1 is lost: nothing is heard", said[0])) == 1
    assert "go on with the same command and --resume" in said[0]
    if lose is not kill_all:  # each is lost to the other
        assert len(re.findall("host lobra-0 with rank 0 is lost", said[1])) == 1


def test_a_run_goes_on_when_it_is_back(place: Path, nodes: tuple[Node, Node]) -> None:
    write_ssh(place / "bin", nodes)
    Path("hosts.txt").write_text("lobra-0 slots=1\nlobra-1 slots=1\n")
    Path("env.sh").write_text(f"export GLOO_SOCKET_IFNAME={INTERFACE}\n")
    words = [sys.executable, "-m", "lobra", "train", *arguments("--output-dir", "runs/a")]
    words += ["--host-file", "hosts.txt", "--env-file", "env.sh", "--server-addr", "lobra-0"]
    words += ["--save-every", str(SAVE_EVERY), "--hang-timeout", str(HANG_TIMEOUT_S)]
    words += ["--max-restarts", "1"]
    running = started(nodes[0].command(words), "said.txt")
    await_checkpoint(running)
    nodes[1].pull_the_cable()
    until = time.monotonic() + PATIENCE_S
    while (
        "waiting for what does not answer by ssh: host lobra-1" not in Path("said.txt").read_text()
    ):
        assert running.poll() is None and time.monotonic() < until, Path("said.txt").read_text()
        time.sleep(0.1)
    nodes[1].plug_it_in()
    assert running.wait(PATIENCE_S) == 0, Path("said.txt").read_text()
    said = Path("said.txt").read_text()
    assert "host lobra-1 with rank 1 is lost" in said
    assert "restart 1 of 1, from step" in said
    assert main(training_arguments(Path("plan.yaml"), Path("alone"))) == 0
    expected, found = adapters("alone"), adapters("runs/a")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_run_goes_on_without_it(place: Path, nodes: tuple[Node, Node]) -> None:
    """On a plan for the node that is left, to the adapters of a run that nothing disturbed."""
    write_ssh(place / "bin", nodes)
    Path("hosts.txt").write_text("lobra-0 slots=1\nlobra-1 slots=1\n")
    Path("env.sh").write_text(f"export GLOO_SOCKET_IFNAME={INTERFACE}\n")
    Path("memory.csv").write_text("tp,pp,sp,max_tokens\n1,1,1,300\n2,1,1,600\n")
    with Path("plan.yaml").open("a") as file:
        file.write("meta: {memory_profile: {file: memory.csv}}\n")
    words = [sys.executable, "-m", "lobra", "train", *arguments("--output-dir", "runs/a")]
    words += ["--host-file", "hosts.txt", "--env-file", "env.sh", "--server-addr", "lobra-0"]
    words += ["--save-every", str(SAVE_EVERY), "--hang-timeout", str(HANG_TIMEOUT_S)]
    words += ["--max-restarts", "1", "--replan", "auto", "--await-hosts", "1"]
    running = started(nodes[0].command(words), "said.txt")
    await_checkpoint(running)
    nodes[1].pull_the_cable()
    assert running.wait(2 * PATIENCE_S) == 0, Path("said.txt").read_text()
    said = Path("said.txt").read_text()
    assert "waiting for what does not answer by ssh: host lobra-1" in said
    assert "host lobra-1 (1 GPU) is lost: the run goes on on <1,1>x1 instead of <1,1>x2" in said
    (noted,) = read_replans(Path("runs/a"))
    assert noted.switched and noted.pause_s and noted.reason == "host lobra-1 (1 GPU) is lost"
    steps = read_metrics(Path("runs/a"))
    assert [line["step"] for line in steps] == list(range(STEPS))
    assert [len(steps[step]["replicas"]) for step in (0, -1)] == [2, 1]
    assert main(["report", "runs/a", "--verify"]) == 0
    assert main(training_arguments(Path("plan.yaml"), Path("alone"))) == 0
    expected, found = adapters("alone"), adapters("runs/a")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-8 * value.norm(), name
