"""Times of tp ranks estimated from one shard on one device, against tp real ranks, on this CPU.

    python benchmarks/profiler_single_device.py FOLDER [--tp 2] [--clock wall|processor]

Three profiles of the tiny model in FOLDER: real ranks (with the all-reduces measured between them),
one shard with all-reduces from the table of accelerators, one shard with the measured ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lobra.profiler.profiles import TimeProfile, load_time_profile  # noqa: E402


def profile(output: Path, *more: str) -> TimeProfile:
    """Run `lobra profile time` (continued if interrupted) and return its rows."""
    command = [sys.executable, "-m", "lobra.cli", "profile", "time", "--model", "tiny"]
    command += ["--device", "cpu", "--output", str(output.resolve()), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=output.parent, env=environment, check=True)
    return load_time_profile(output)


def main() -> None:
    """Measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tp", default="2")
    parser.add_argument("--max-seq-length", default="1024")
    parser.add_argument("--clock", default="wall", choices=("wall", "processor"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shapes = ["--tp", args.tp, "--max-seq-length", args.max_seq_length, "--clock", args.clock]
    print(f"load {os.getloadavg()[0]:.1f}")
    real = profile(args.folder / "real.csv", *shapes)
    links = (args.folder / "links_real.csv").resolve()
    alone = ["--single-device", "--restart", "changed"]
    table = profile(args.folder / "table.csv", *shapes, *alone)
    measured = profile(args.folder / "measured.csv", *shapes, *alone, "--links", str(links))
    print(f"load {os.getloadavg()[0]:.1f}")
    print("     b x s      real ms   shard + table   shard + measured links")
    errors = []
    for row in range(len(real)):
        key = (real.mbs[row], real.seq_len[row])
        line = f"{key[0]:5} x {key[1]:5} {real.time_ms[row]:9.3f}"
        found = []
        for other in (table, measured):
            same = (other.mbs == key[0]) & (other.seq_len == key[1])
            found.append(float(other.time_ms[same][0]) / real.time_ms[row] - 1.0)
        errors.append(found)
        print(f"{line} {100 * found[0]:+13.1f} % {100 * found[1]:+15.1f} %")
    medians = 100 * np.median(np.abs(errors), axis=0)
    print(f"median error: {medians[0]:.1f} % with the table's links, {medians[1]:.1f} % measured")


if __name__ == "__main__":
    main()
