"""kill -9 in the middle of a sweep, then the same command: nothing lost, nothing measured twice."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lobra.profiler.profiles import load_time_profile
from tests.model.support import is_alive, save_llama


@pytest.mark.long
@pytest.mark.ranks
def test_a_killed_time_profile_is_continued(tmp_path: Path, project_root: Path) -> None:
    folder = save_llama(tmp_path / "llama")
    path = tmp_path / "time.csv"
    arguments = ["time", "--model", str(folder), "--tp", "1", "--device", "cpu"]
    arguments += ["--max-seq-length", "128", "--output", str(path)]
    command = [sys.executable, "-m", "lobra.cli", "profile", *arguments]

    process = subprocess.Popen(
        command, cwd=project_root, start_new_session=True, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_bytes().count(b"\n") > 1):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no row was measured"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while is_alive(-process.pid):
        assert time.monotonic() < deadline, "its ranks live on"
        time.sleep(0.05)

    before = path.read_bytes()
    assert before.count(b"\n") - 1 < 3, "it was killed in the middle"
    complete = before[: before.rfind(b"\n") + 1]
    subprocess.run(command, cwd=project_root, check=True, stderr=subprocess.DEVNULL)
    assert path.read_bytes().startswith(complete), "the rows measured before are as they were"
    for name in (path, path.with_name("head_time.csv")):
        profile = load_time_profile(name)
        shapes = list(zip(profile.tp, profile.seq_len, profile.mbs, strict=True))
        assert len(set(shapes)) == len(shapes) == 3
