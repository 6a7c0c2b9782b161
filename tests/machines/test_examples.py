"""The examples say what the commands and Kubernetes take: run against stubs, held to schemas."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lobra.trainer.host_file import read_host_file
from lobra.trainer.run import sourced_environment
from tests.machines.nodes import clean_environment, write_script


@pytest.fixture
def examples(project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, in one where `torchrun`, `srun` and `scontrol` say what they were given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(project_root / "examples", "examples")
    write_script(tmp_path / "bin" / "torchrun", 'echo "torchrun $*"\n')
    write_script(
        tmp_path / "bin" / "scontrol",
        '[[ $* == "show hostnames n[3-4]" ]] && printf "n3\\nn4\\n"\n',
    )
    write_script(
        tmp_path / "bin" / "srun",
        '[[ $1 == --kill-on-bad-exit=1 ]] && shift\nfor n in 0 1; do SLURM_NODEID=$n "$@"; done\n',
    )
    return tmp_path / "examples"


def said(script: str, *words: str, **variables: str) -> list[str]:
    path = f"{Path.cwd() / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", f"examples/{script}", *words],
        env=clean_environment(PATH=path, **variables), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


TAIL = "-m lobra train --output-dir runs/a --model tiny --device cpu"
WORDS = ("--model", "tiny", "--device", "cpu")
ON_TWO = {"NODES": "2", "RANKS": "3", "FIRST": "n3", "RUN": "runs/a"}


def test_torchrun_meets_by_number_or_by_itself(examples: Path) -> None:
    (line,) = said("torchrun.sh", *WORDS, **ON_TWO)
    meeting = "--rdzv-backend c10d --rdzv-endpoint n3:29500 --rdzv-id a"
    assert line == f"torchrun --nnodes 2 --nproc-per-node 3 {meeting} {TAIL}"
    (line,) = said("torchrun.sh", *WORDS, **ON_TWO, NODE_RANK="1", PORT="1234")
    meeting = "--node-rank 1 --master-addr n3 --master-port 1234"
    assert line == f"torchrun --nnodes 2 --nproc-per-node 3 {meeting} {TAIL}"
    Path("runs/a/checkpoints/step_4").mkdir(parents=True)
    Path("runs/a/checkpoints/step_4/state.json").touch()
    (line,) = said("torchrun.sh", *WORDS, **ON_TWO)
    assert "--output-dir runs/a --resume --model tiny" in line


def test_torchrun_says_what_it_was_not_told(examples: Path) -> None:
    for name in ON_TWO:
        told = {key: value for key, value in ON_TWO.items() if key != name}
        done = subprocess.run(
            ["bash", "examples/torchrun.sh"], env=clean_environment(**told),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode and f"{name}: " in done.stderr


def test_a_slurm_job_numbers_its_nodes(examples: Path) -> None:
    variables = {
        "SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "h100:3", "SLURM_JOB_ID": "120042",
        "SLURM_JOB_NODELIST": "n[3-4]", "RUN": "runs/a",
    }  # fmt: skip
    lines = said("slurm.sh", *WORDS, **variables)
    assert lines == [
        f"torchrun --nnodes 2 --nproc-per-node 3 --node-rank {number} --master-addr n3 "
        f"--master-port 20042 {TAIL}"
        for number in (0, 1)
    ]
    asked = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", (examples / "slurm.sh").read_text(), re.M)
    assert dict(asked)["ntasks-per-node"] == "1" and dict(asked)["signal"] == "TERM@120"


def test_host_file_and_environment_file_can_be_read(examples: Path) -> None:
    assert read_host_file(examples / "hosts.txt") == {"node1": 8, "node2": 8}
    assert sourced_environment(examples / "env.sh")["GLOO_SOCKET_IFNAME"] == "eth0"


def manifests(examples: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((examples / "kubernetes.yaml").read_text()))


@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_kubernetes_takes_the_manifests(examples: Path, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for manifest in manifests(examples):
        validator.validate(manifest, version, strict=True)
        wrong = {**manifest, "spec": {**manifest["spec"], "completion": 2}}
        with pytest.raises(validator.ValidationError, match="completion"):
            validator.validate(wrong, version, strict=True)


def test_pods_find_each_other(examples: Path) -> None:
    """What no schema says: names, numbers and volumes that must fit each other."""
    service, job = manifests(examples)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["FIRST"] == f"{name}-0.{pod['subdomain']}"
    assert job["spec"]["completionMode"] == "Indexed"
    assert int(variables["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(variables["RANKS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert {own["name"] for own in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert variables["RUN"].startswith(container["volumeMounts"][0]["mountPath"])
