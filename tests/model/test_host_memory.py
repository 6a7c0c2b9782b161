"""What tensors leave is there for the next ones, or given back, as was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

NUM_BYTES = 24 << 20
# Takes, fills and leaves the same block again and again; prints how many pages the last one cost.
SCRIPT = f"""
import resource, sys
from lobra.model import host_memory
getattr(host_memory, sys.argv[1])()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytes(1) * {NUM_BYTES}
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(taken * resource.getpagesize())
"""


@pytest.mark.parametrize(
    ("asked", "is_taken_anew"), [("keep_freed_memory", False), ("return_freed_memory", True)]
)
def test_freed_memory(asked: str, is_taken_anew: bool, project_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, asked],
        cwd=project_root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (int(done.stdout) > NUM_BYTES // 2) == is_taken_anew
