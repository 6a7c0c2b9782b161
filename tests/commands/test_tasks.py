"""`lobra tasks` beside a run that trains: what it answers, and what the run then is."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from lobra.cli import main
from lobra.trainer.metrics import METRICS_FILE, read_metrics
from lobra.trainer.run_config import read_run_config
from tests.report.runs import write_run
from tests.trainer.command import train, write_config

pytestmark = [pytest.mark.ranks, pytest.mark.long]
RUN = Path("run")


def wait_for(line: int) -> None:
    while not (RUN / METRICS_FILE).is_file() or len(read_metrics(RUN)) < line:
        time.sleep(0.05)


def test_tasks_join_and_leave_by_command(
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By the command, from another thread than the run's, and by the watched file."""
    write_config(name="own", steps=150)
    shared = json.loads(Path("tasks.json").read_text())["task"][0]
    Path("more.json").write_text(json.dumps({"task": [{**shared, "name": "more", "steps": 4}]}))
    bad = {"task": [{**shared, "name": "bad", "dataset_name": "nowhere"}]}
    Path("bad.json").write_text(json.dumps(bad))
    codes: dict[str, int] = {}

    def ask() -> None:
        wait_for(2)
        codes["add"] = main(["tasks", "add", "run", "more.json"])
        codes["bad"] = main(["tasks", "add", "run", "bad.json"])
        codes["list"] = main(["tasks", "list", "run", "--json"])
        file = json.loads(Path("tasks.json").read_text())
        file["task"].append({**shared, "name": "listed", "steps": 3})
        file["train_task_num"] = 2
        Path("tasks.json").write_text(json.dumps(file))
        while "listed" not in [task.name for task in read_run_config(RUN).tasks]:
            time.sleep(0.05)
        codes["cancel"] = main(["tasks", "cancel", "run", "own"])

    asking = threading.Thread(target=ask)
    asking.start()
    assert train(place, "--watch-tasks", "--save-every", "1", "--keep-checkpoints", "99") == 0
    asking.join()
    assert codes == {"add": 0, "bad": 2, "list": 0, "cancel": 0}
    out, err = capsys.readouterr()
    assert "task more joins after step" in out and "task own leaves after step" in out
    assert "task bad: dataset_name = 'nowhere': no such data set" in err
    listed = json.loads(next(line for line in out.splitlines() if line.startswith('{"tasks"')))
    assert {row["task"] for row in listed["tasks"]} == {"own", "more"}
    tasks = {task.name: task for task in read_run_config(RUN).tasks}
    assert tasks["own"].left_at is not None and tasks["own"].left_at < 150
    for name, steps in (("more", 4), ("listed", 3), ("own", tasks["own"].left_at)):
        assert sum(name in line["tasks"] for line in read_metrics(RUN)) == steps
        assert (RUN / "adapters" / name / "adapter_model.safetensors").is_file()
    assert main(["report", "run", "--verify"]) == 0
    out = capsys.readouterr().out
    assert "cancelled" in out and "nothing was trained twice or left out" in out
    assert "losses and norms are the same to the last bit" in out
    assert main(["tasks", "cancel", "run", "more", "--timeout", "0.1"]) == 1
    assert "no answer for more within 0.1 s" in capsys.readouterr().err
    assert list((RUN / "task_requests").glob("*.request.json")) == []


def test_a_run_that_is_over_is_asked_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", ["short"], 2)
    assert main(["tasks", "cancel", str(tmp_path / "run"), "short"]) == 2
    assert "the run is not going on" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("task_requests/*"))
    assert main(["tasks", "list", str(tmp_path / "nix")]) == 2
    assert "no config.yaml in it; give the folder of a run" in capsys.readouterr().err


def test_who_gives_up_withdraws_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_run: Path, _name: str, _until: float) -> None:
        raise KeyboardInterrupt

    write_run(tmp_path / "run", ["short"], 2)
    monkeypatch.setattr("lobra.commands.tasks.is_held", lambda _lock: True)
    monkeypatch.setattr("lobra.commands.tasks.answer_to", interrupted)
    assert main(["tasks", "cancel", str(tmp_path / "run"), "short"]) == 130
    assert not list((tmp_path / "run").glob("task_requests/*.request.json"))


def test_the_list_says_how_far_each_task_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", ["short", "done"], 2)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["tasks"][0]["num_steps"] = 5
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["tasks", "list", str(run)]) == 0
    out = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in out.splitlines() if "│" in line]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["short", "2 of 5", lines[0][2].strip(), "waits for the run to go on"],
        ["done", "2 of 2", lines[1][2].strip(), "done"],
    ]
    assert float(lines[0][2]) > 0
    assert "the run is after 2 steps, and not going on" in out
    monkeypatch.setattr("lobra.commands.tasks.is_held", lambda _lock: True)
    main(["tasks", "list", str(run)])
    assert "trains" in capsys.readouterr().out
