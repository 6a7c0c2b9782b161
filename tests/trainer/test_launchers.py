"""torchrun, deepspeed and a host file start the ranks of a plan: the same adapters as without."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lobra.cli import main
from tests.assets.golden import copy_inputs
from tests.assets.golden.make import training_arguments
from tests.machines.nodes import clean_environment

pytestmark = pytest.mark.ranks

PLANS = {
    "<2,1>": "strategy_config: [{dp: 1, tp: 2, pp: 1, max_tokens: 256}]\n",
    "<1,1>x2": "strategy_config: [{dp: 2, tp: 1, pp: 1, max_tokens: 256}]\n",
}
MODULES = {"torchrun": "torch.distributed.run", "deepspeed": "deepspeed.launcher.runner"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, tasks and data, outside the checkout."""
    copy_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(name: str) -> list[str]:
    """Return an installed launcher as users call it, where the environment has its script."""
    beside = Path(sys.executable).with_name(name)
    return [str(beside)] if beside.exists() else [sys.executable, "-m", MODULES[name]]


def free_port() -> str:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return str(tried.getsockname()[1])


def launcher(name: str) -> list[str]:
    """Return the command that starts two processes, up to the module they run."""
    if name == "torchrun":
        return [*script(name), "--standalone", "--nproc-per-node", "2", "-m", "lobra"]
    port = ["--master_port", free_port()]
    return [*script(name), "--no_local_rank", "--num_gpus", "2", *port, "--module", "lobra"]


def run(command: list[str]) -> str:
    """Run a command as from a user's shell; return what it printed."""
    done = subprocess.run(
        command, env=clean_environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def adapters(folder: str) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": value
        for path in sorted(Path(folder).glob("adapters/*/adapter_model.safetensors"))
        for name, value in load_file(path).items()
    }


def check_same(plan: str, launched: str) -> None:
    """Train without a launcher too; both have written the same adapters, bit for bit."""
    assert main(training_arguments(Path(plan), Path("alone"))) == 0
    expected, found = adapters("alone"), adapters(launched)
    assert {name.split(".")[0] for name in found} == {"everything", "few"}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("torchrun", "<2,1>"),
        pytest.param("deepspeed", "<1,1>x2", marks=pytest.mark.long),
        pytest.param("torchrun", "<1,1>x2", marks=pytest.mark.long),
        pytest.param("deepspeed", "<2,1>", marks=pytest.mark.long),
    ],
)
def test_two_ranks_of_a_launcher(place: Path, name: str, plan: str) -> None:
    Path("plan.yaml").write_text(PLANS[plan])
    shown = run([*launcher(name), *training_arguments(Path("plan.yaml"), Path("run"))])
    assert shown.count("adapters (PEFT format)") == 1, "one rank reports"
    check_same("plan.yaml", "run")


@pytest.mark.long
def test_a_host_file_that_names_this_machine(place: Path) -> None:
    """Two of its three slots are used; nothing is asked by ssh."""
    Path("hosts").write_text("localhost slots=3\n")
    Path("plan.yaml").write_text(PLANS["<2,1>"])
    more = ["--host-file", "hosts", "--server-port", free_port()]
    arguments = training_arguments(Path("plan.yaml"), Path("run"))
    run([sys.executable, "-m", "lobra", *arguments, *more])
    check_same("plan.yaml", "run")


def rank_process(rank: int) -> int | None:
    """Return the process of a rank that a launcher has started in this folder, if there is one."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            variables = (process / "environ").read_bytes().split(b"\0")
            if b"RANK=%d" % rank in variables and (process / "cwd").resolve() == Path.cwd():
                return int(process.name)
    return None


def write_steps(steps: int) -> None:
    """Have every task make so many."""
    content = json.loads(Path("tasks.json").read_text())
    for task in content["task"]:
        task["steps"] = steps
    Path("tasks.json").write_text(json.dumps(content))


def await_step_4(launched: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 240
    while not list(Path("run").glob("checkpoints/step_[4-9]*")):
        assert launched.poll() is None and time.monotonic() < until, Path("said.txt").read_text()
        time.sleep(0.02)


@pytest.mark.long
def test_torchrun_s_own_restarts_go_on_but_not_with_another_launch_s_run(place: Path) -> None:
    write_steps(16)
    Path("plan.yaml").write_text(PLANS["<1,1>x2"])
    torchrun = [*script("torchrun"), "--max-restarts", "1", *launcher("torchrun")[1:]]
    command = [*torchrun, *training_arguments(Path("plan.yaml"), Path("run")), "--save-every", "2"]
    with Path("said.txt").open("w") as said:
        launched = subprocess.Popen(
            command, env=clean_environment(), stdout=said, stderr=subprocess.STDOUT
        )
    await_step_4(launched)
    killed = rank_process(1)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert launched.wait(timeout=240) == 0, Path("said.txt").read_text()
    shown = Path("said.txt").read_text()
    assert shown.count("torchrun has started the ranks again: the run goes on from step ") == 1
    check_same("plan.yaml", "run")
    again = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert again.returncode
    assert again.stderr.count("--output-dir run: already holds a run") == 2
    assert "goes on from" not in again.stderr


@pytest.mark.long
def test_a_launched_rank_that_stands_still_is_named_and_the_run_starts_again(place: Path) -> None:
    write_steps(16)
    Path("hosts").write_text("localhost slots=2\n")
    Path("plan.yaml").write_text(PLANS["<1,1>x2"])
    more = ["--host-file", "hosts", "--server-port", free_port(), "--hang-timeout", "5"]
    more += ["--max-restarts", "1", "--save-every", "2"]
    arguments = training_arguments(Path("plan.yaml"), Path("run"))
    with Path("said.txt").open("w") as said:
        lobra = subprocess.Popen(
            [sys.executable, "-m", "lobra", *arguments, *more],
            env=clean_environment(), stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
    await_step_4(lobra)
    stopped = rank_process(1)
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    assert lobra.wait(timeout=240) == 0, Path("said.txt").read_text()
    shown = Path("said.txt").read_text()
    assert "rank 1 holds the run up: it has not moved for 5 s" in shown
    assert "is stopped by a signal (T); waiting for it: rank 0, " in shown
    assert "restart 1 of 1, from step" in shown
    assert [path.name for path in Path("run/stacks").iterdir()] == ["rank_0.txt"]
    check_same("plan.yaml", "run")
