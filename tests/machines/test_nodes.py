"""Two nodes of three ranks, each with an address of its own: the adapters are those of one machine.

The nodes are network namespaces (`tests.machines.nodes`). Ranks are started on them as users would:
by the examples' Slurm script and Kubernetes manifest, and by a host file.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.assets.golden import HERE as GOLDEN
from tests.assets.golden.make import training_arguments
from tests.machines.conftest import PLAN
from tests.machines.nodes import INTERFACE, Node, clean_environment, write_script, write_ssh

pytestmark = [pytest.mark.ranks, pytest.mark.long]

BAR = 1e-10  # of golden adapters, as on one machine


def arguments(*more: str) -> list[str]:
    """Return the arguments of `lobra train`, without its folder."""
    command, *words = training_arguments(Path("plan.yaml"), Path("runs/a"))
    assert command == "train" and words[-2] == "--output-dir"
    return [*words[:-2], *more]


def run_together(commands: Sequence[Sequence[str]], **variables: str) -> str:
    """Run commands beside each other, which must all succeed; return what they printed."""
    running = [
        subprocess.Popen(
            command, env=clean_environment(**variables),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command in commands
    ]  # fmt: skip
    shown = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(shown)
    return "\n".join(shown)


def check_golden(run: Path) -> None:
    """Check the adapters, and that no tensor-parallel group lies on two nodes."""
    for path in sorted((GOLDEN / "adapters").glob("*.safetensors")):
        trained = load_file(run / "adapters" / path.stem / "adapter_model.safetensors")
        expected = load_file(path)
        assert trained.keys() == expected.keys()
        for key, value in expected.items():
            assert trained[key].dtype == torch.float64
            error = float((trained[key] - value).norm() / value.norm())
            assert error < BAR, f"{path.stem} {key}: relative error {error:.1e}"
    config = yaml.safe_load((run / "config.yaml").read_text())
    groups = [stage for replica in config["rank_map"] for stage in replica]
    assert sorted(map(len, groups)) == [1, 1, 2, 2]
    assert all(len({rank // 3 for rank in group}) == 1 for group in groups), groups


def test_pods_meet_by_names(place: Path, nodes: tuple[Node, Node], project_root: Path) -> None:
    """The manifest's command in its environment, on nodes with the pods' names; runs/ is shared."""
    _, job = yaml.safe_load_all((project_root / "examples/kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    variables |= {"RANKS": "3", "RUN": "runs/a"}
    bash, script = container["command"]
    script = script.replace("/opt/lobra", str(project_root))
    words = [bash, script, *arguments("--batching", "packed")]
    shown = run_together([node.command(words) for node in nodes], **variables)
    assert shown.count("adapters (PEFT format)") == 1, "one rank reports"
    check_golden(Path("runs/a"))


def test_a_slurm_job_on_folders_of_their_own_goes_on(
    place: Path, nodes: tuple[Node, Node], project_root: Path
) -> None:
    """Only the node of rank 0 has the run and the first adapters; the other is sent its part."""
    shutil.copytree(project_root / "examples", "examples")
    nodes[1].hide(place / "runs")
    nodes[1].hide(place / "start")
    write_script(place / "bin" / "scontrol", "printf '%s\\n' lobra-0 lobra-1\n")
    starts = "\n".join(
        f"SLURM_NODEID={number} nsenter --target {node.pid} --net --uts --mount "
        f'bash -c \'cd "$0" && exec "$@"\' {place} "$@" & tasks+=($!)'
        for number, node in enumerate(nodes)
    )
    write_script(
        place / "bin" / "srun",
        f'shift; tasks=()\n{starts}\nfor task in "${{tasks[@]}}"; do wait "$task" || exit; done\n',
    )
    variables = {
        "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "cpu:3", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "lobra-[0-1]", "RUN": "runs/a",
    }  # fmt: skip
    words = ["bash", "examples/slurm.sh", *arguments()]
    run_together([[*words, "--max-steps", "2"]], **variables)
    assert Path("runs/a/checkpoints/step_2/state.json").is_file()
    run_together([words], **variables)
    check_golden(Path("runs/a"))
    there = subprocess.run(nodes[1].command(["ls", "-A", "runs"]), capture_output=True, text=True)
    assert there.stdout == "", "the other node has written nothing"
    metrics = Path("runs/a/metrics.jsonl").read_text()
    assert re.findall(r'^\{"step": (\d+)', metrics, re.M) == [
        str(n) for n in range(metrics.count("\n"))
    ]


def test_hosts_of_a_host_file(place: Path, nodes: tuple[Node, Node]) -> None:
    """DeepSpeed's launcher, by `pdsh` and `ssh`; an environment file names the interface.

    The plan says ranks for other nodes: one group would be on both.
    """
    Path("plan.yaml").write_text(f"{PLAN}meta: {{ranks: [[[0, 1]], [[2, 3]], [[4]], [[5]]]}}\n")
    write_ssh(place / "bin", nodes)
    Path("hosts.txt").write_text("lobra-0 slots=3\nlobra-1 slots=3\n")
    Path("env.sh").write_text(f"export GLOO_SOCKET_IFNAME={INTERFACE}\n")
    words = [sys.executable, "-m", "lobra", "train", *arguments("--output-dir", "runs/a")]
    words += ["--host-file", "hosts.txt", "--env-file", "env.sh", "--server-addr", "lobra-0"]
    run_together([nodes[0].command(words)])
    check_golden(Path("runs/a"))
