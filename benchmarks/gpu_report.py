"""One JSON of what the parts of benchmarks/gpu.sh have found so far.

    python -m benchmarks.gpu_report OUT

Reads OUT/parts.tsv (name, exit status, seconds) and each part's NAME.json, writes OUT/gpu.json and
prints a line about the last part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lobra.common.files import write_atomic

NOTHING_TO_TEST = 5  # pytest's status
LEFT_OUT = 127  # gpu.sh's
TOO_LATE = (124, 137)  # timeout's


def read_parts(folder: Path) -> dict[str, dict[str, Any]]:
    """Return of every part how it ended, what it took and what it found (None: nothing)."""
    parts = {}
    for line in (folder / "parts.tsv").read_text(encoding="utf-8").splitlines():
        name, status, seconds = line.split("\t")
        path = folder / f"{name}.json"
        parts[name] = {
            "ended": how_it_ended(int(status)),
            "seconds": int(seconds),
            "found": json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None,
        }
    return parts


def how_it_ended(status: int) -> str:
    """Return an exit status in words."""
    if status == 0:
        return "ok"
    if status == NOTHING_TO_TEST:
        return "there was nothing to test"
    if status == LEFT_OUT:
        return "left out, as packages are missing"
    return "out of time" if status in TOO_LATE else f"failed with {status}"


def main() -> int:
    """Write the JSON and say how the last part ended."""
    folder = Path(sys.argv[1])
    parts = read_parts(folder)
    write_atomic(folder / "gpu.json", json.dumps(parts, indent=1) + "\n")
    name, last = list(parts.items())[-1]
    print(f"-- {name}: {last['ended']}, {last['seconds']} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
