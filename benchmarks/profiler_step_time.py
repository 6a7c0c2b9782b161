"""Predicted against measured step times of real training runs of the tiny model on this machine.

Profiles the plan's tensor-parallel sizes in a folder (continued if it was interrupted) and trains
there. A row is a step after the first two. On a busy machine it is the load that is measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from lobra.trainer.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PLANS = {
    "one": ([{"dp": 1, "tp": 1, "pp": 1, "max_tokens": 2048}], "1", 1),
    "mixed": (
        [
            {"dp": 2, "tp": 1, "pp": 1, "max_tokens": 1024},
            {"dp": 1, "tp": 2, "pp": 1, "max_tokens": 2048},
        ],
        "1,2",
        4,
    ),
}
WARM_UP_STEPS = 2


def lobra(folder: Path, *arguments: str) -> None:
    """Run a `lobra` command in the folder; raises CalledProcessError if it fails."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lobra.cli", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def profiler_step_time(
    folder: Path,
    *,
    plan: Literal["one", "mixed"] = "one",
    memory: Literal["keep", "lean", "full"] = "keep",
    quick: bool = False,
    steps: int = 12,
) -> Iterator[dict[str, Any]]:
    """Profile, train, and compare every step's predicted with its measured time.

    Parameters
    ----------
    folder
        Where the profile and the run are kept.
    plan
        One rank, or <1,1>x2 <2,1>x1.
    memory
        The policy of all replicas.
    quick
        Profile as the quickstart does.
    steps
        To train.
    """
    replicas, tps, ranks = PLANS[plan]
    folder.mkdir(parents=True, exist_ok=True)
    plan_file, run = (folder / "plan.yaml").resolve(), (folder / f"run_{plan}").resolve()
    strategy = {"strategy_config": [{**replica, "memory": memory} for replica in replicas]}
    plan_file.write_text(yaml.safe_dump(strategy), encoding="utf-8")
    common = ["--model", "tiny", "--device", "cpu"]
    common += ["--trainer-config", str(ROOT / "trainer_config" / "quickstart.json")]
    load = [] if ranks == 1 else ["--load-ranks", str(ranks)]
    sweep = ["--tp", tps, "--memory", memory, *load, *(["--quick"] if quick else [])]
    lobra(folder, "profile", "time", *common, *sweep)
    where = ["--strategy-config", str(plan_file), "--output-dir", str(run)]
    lobra(folder, "train", *common, *where, "--max-steps", str(steps))
    step_errors, replica_errors = [], []
    for step in read_metrics(run)[WARM_UP_STEPS:]:
        error = step["predicted_step_time_s"] / step["step_time_s"] - 1.0
        step_errors.append(abs(error))
        replica_errors += [
            abs(replica["busy_s"] / replica["predicted_s"] - 1.0)
            for replica in step["replicas"]
            if replica["predicted_s"] > 0
        ]
        yield {
            "step": step["step"],
            "measured s": step["step_time_s"],
            "predicted s": step["predicted_step_time_s"],
            "error, %": 100 * error,
        }
    yield {
        "steps": len(step_errors),
        "median error of a step, %": 100 * float(np.median(step_errors)),
        "of a replica's busy time, %": 100 * float(np.median(replica_errors)),
    }
