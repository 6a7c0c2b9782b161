"""Predicted against measured step times of real training runs of the tiny model on this machine.

    python benchmarks/profiler_step_time.py FOLDER [--plan one|mixed] [--steps 12]

Profiles the plan's tensor-parallel sizes in FOLDER (continued if it was interrupted), trains there,
and prints the errors of every step after the first two. The load is printed too: on a busy machine
it is the load that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PLANS = {
    "one": ("[{dp: 1, tp: 1, pp: 1, max_tokens: 2048}]", "1", 1),
    "mixed": (
        "[{dp: 2, tp: 1, pp: 1, max_tokens: 1024}, {dp: 1, tp: 2, pp: 1, max_tokens: 2048}]",
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


def step_errors(metrics: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (measured s, predicted s) of the steps, and each replica's busy / predicted - 1."""
    steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    steps = steps[WARM_UP_STEPS:]
    measured = np.array([step["step_time_s"] for step in steps])
    predicted = np.array([step["predicted_step_time_s"] for step in steps])
    busy = [
        replica["busy_s"] / replica["predicted_s"] - 1.0
        for step in steps
        for replica in step["replicas"]
        if replica["predicted_s"] > 0
    ]
    return measured, predicted, np.array(busy)


def main() -> None:
    """Profile, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plan", choices=tuple(PLANS), default="one")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    plan, tps, ranks = PLANS[args.plan]
    args.folder.mkdir(parents=True, exist_ok=True)
    (args.folder / "plan.yaml").write_text(f"strategy_config: {plan}\n", encoding="utf-8")
    config = ROOT / "trainer_config" / "quickstart.json"
    load = ["--trainer-config", str(config)]
    load += [] if ranks == 1 else ["--load-ranks", str(ranks)]
    print(f"load before profiling: {os.getloadavg()[0]:.1f}")
    lobra(args.folder, "profile", "time", "--model", "tiny", "--tp", tps, "--device", "cpu", *load)
    print(f"load before training: {os.getloadavg()[0]:.1f}")
    run = args.folder / f"run_{args.plan}"
    plan_path = (args.folder / "plan.yaml").resolve()
    lobra(
        args.folder,
        *("train", "--model", "tiny", "--trainer-config", str(config), "--device", "cpu"),
        *("--strategy-config", str(plan_path), "--output-dir", str(run.resolve())),
        *("--max-steps", str(args.steps)),
    )
    measured, predicted, busy = step_errors(run / "metrics.jsonl")
    error = predicted / measured - 1.0
    print(f"load after training: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print(f"steps {len(measured)}, measured median {np.median(measured):.3f} s")
    print(f"predicted / measured - 1: {' '.join(f'{100 * e:+.0f} %' for e in error)}")
    print(f"median error of a step {100 * np.median(np.abs(error)):.1f} %")
    print(f"median error of a replica's busy time {100 * np.median(np.abs(busy)):.1f} %")


if __name__ == "__main__":
    main()
