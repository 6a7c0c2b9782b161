"""A base installation has no torch: planning, simulating and reporting do without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lobra.cli import COMMANDS
from tests.commands.test_plan import files  # noqa: F401 (a fixture)
from tests.report.runs import write_run

SMALL_PLAN = (
    "--model", "tiny", "--trainer-config", "config.json", "--strategy-config", "plan.yaml",
    "--time-profile", "time.csv", "--memory-profile", "memory.csv",
)  # fmt: skip
LENGTHS = ("--lengths", "lengths.json")
ESTIMATE = ("--model", "7B", "--estimate", "--accelerator", "A100-40GB", "--output")
# Commands in order, each with its exit code. The last ones say what to install.
WORKFLOW: tuple[tuple[tuple[str, ...], int], ...] = (
    (("profile", "time", "--tp", "1,2", "--trainer-config", "config.json", *ESTIMATE, "t.csv"), 0),
    (
        (
            "profile", "memory", "--num-gpus", "4", "--trainer-config", "config.json",
            *ESTIMATE, "m.csv",
        ),
        0,
    ),
    (("plan", *SMALL_PLAN, *LENGTHS, "--num-gpus", "4"), 0),
    (("simulate", *SMALL_PLAN, *LENGTHS, "--steps", "2", "--output-dir", "simulated"), 0),
    (("report", "simulated"), 0),
    (("report", "run", "--plots", "--trace"), 0),
    (("doctor", "--strategy-config", "plan.yaml"), 0),
    (("--install-completion", "--shell", "bash", "--output", "completion"), 0),
    *(((*name.split(), "--help"), 0) for name, (path, _) in COMMANDS.items() if path),
    (
        (
            "train", "--model", "tiny", "--trainer-config", "config.json",
            "--strategy-config", "plan.yaml", "--output-dir", "trained",
        ),
        2,
    ),
    (("profile", "time", "--model", "tiny", "--tp", "1", "--device", "cpu"), 2),
)  # fmt: skip


PROGRAM = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
from lobra.cli import TRAIN_PACKAGES, main

class NotInstalled:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in TRAIN_PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled)
for words in json.loads(sys.argv[2]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(words)
    print(json.dumps([code, output.getvalue()]))
"""


def check_workflow(folder: Path, done: Iterable[tuple[int, str]]) -> None:
    """Check the exit code and the output of every command of `WORKFLOW`, run in this folder."""
    for (words, expected), (code, output) in zip(WORKFLOW, done, strict=True):
        assert code == expected, f"{' '.join(words)}: {output}"
        assert "Traceback" not in output
        assert expected == 0 or "is not installed; needed to measure, to train" in output
    assert (folder / "run" / "report" / "losses.png").is_file()
    assert "--lengths" in (folder / "completion").read_text(), "options of what can be imported"


def test_planning_needs_no_package_of_training(files: Path, project_root: Path) -> None:  # noqa: F811
    write_run(files / "run", ["short", "long"], 4)
    commands = json.dumps([words for words, _ in WORKFLOW])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(project_root), commands],
        cwd=files, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    check_workflow(files, (json.loads(line) for line in done.stdout.splitlines()))
