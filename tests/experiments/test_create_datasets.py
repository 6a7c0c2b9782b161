"""The script that fetches the data sets, against a stand-in for the hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.experiments.hub import COMMIT, Hub, serve


def rows(number: int, **columns: object) -> bytes:
    lines = (
        json.dumps({name: f"{value} {k}" for name, value in columns.items()}) for k in range(number)
    )
    return "\n".join(lines).encode() + b"\n"


REPOSITORIES = {
    "databricks/databricks-dolly-15k": {
        "databricks-dolly-15k.jsonl": rows(5, instruction="do", context="with", response="done")
    },
    "TIGER-Lab/MathInstruct": {"MathInstruct.json": rows(6, instruction="ask", output="answer")},
    "meta-math/MetaMathQA": {"train.json": rows(4, query="ask", response="answer")},
}
BROKEN = "TIGER-Lab/MathInstruct"


def create(hub: Hub, folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).resolve().parents[2] / "scripts" / "create_finetune_datasets.sh"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "VIRTUAL_ENV": "x"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub-cache")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    return subprocess.run(
        ["bash", str(script), *names, "--data-dir", str(folder / "data")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )


def test_a_failing_set_loses_no_other_and_the_same_command_completes(tmp_path: Path) -> None:
    names = ("dolly", "MathInstruct", "MetaMathQA")
    data = tmp_path / "data"
    with serve(REPOSITORIES) as hub:
        hub.broken.add(BROKEN)
        first = create(hub, tmp_path, *names)
        assert first.returncode == 1
        assert BROKEN in first.stderr and "Traceback" not in first.stderr
        assert sorted(p.name for p in data.iterdir()) == [
            "MetaMathQA.jsonl",
            "REVISIONS.json",
            "SHA256SUMS",
            "dolly.jsonl",
        ]
        hub.broken.clear()
        hub.requests.clear()
        second = create(hub, tmp_path, *names)
        assert second.returncode == 0, second.stderr
        assert "dolly.jsonl is there already" in second.stdout
        assert not any("dolly" in request for request in hub.requests)  # not fetched again
    revisions = json.loads((data / "REVISIONS.json").read_text(encoding="utf-8"))
    assert revisions == dict.fromkeys(names, COMMIT)
    entries = [json.loads(line) for line in (data / "dolly.jsonl").read_text().splitlines()]
    assert entries[3] == {"instruction": "do 3", "input": "with 3", "output": "done 3"}
    counts = {p.stem: len(p.read_text().splitlines()) for p in data.glob("*.jsonl")}
    assert counts == {"dolly": 5, "MathInstruct": 6, "MetaMathQA": 4}
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=data, check=False)
    assert checked.returncode == 0


def test_without_network_one_message_says_what_to_do(tmp_path: Path) -> None:
    with serve({}) as hub:
        pass  # the port is closed again
    done = create(hub, tmp_path, "dolly", "MathInstruct")
    assert done.returncode == 1
    assert done.stderr.count("cannot be reached") == 1 and "HF_ENDPOINT" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_told_before_fetching(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lobra.cli import main
    from lobra.commands import data_fetch as published_cli

    monkeypatch.setattr(published_cli, "fetch", lambda *_: pytest.fail("fetched"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = tmp_path / "file" / "data"
    assert main(["data", "fetch", "dolly", "--data-dir", str(folder)]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_file_that_changed_is_named_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lobra.cli import main

    path = tmp_path / "dolly.jsonl"
    path.write_text('{"text": "a"}\n', encoding="utf-8")
    assert main(["data", "fetch", "dolly", "--data-dir", str(tmp_path)]) == 0  # recorded as it is
    path.write_text('{"text": "b"}\n', encoding="utf-8")
    assert main(["data", "fetch", "dolly", "--data-dir", str(tmp_path)]) == 1
    assert "has changed since it was fetched" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == '{"text": "b"}\n'
