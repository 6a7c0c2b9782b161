"""`lobra data show`: rows as the model will see them; and the day of a run's data."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from lobra.cli import main
from lobra.trainer import trained_tasks
from lobra.trainer.log_parts import METRICS_FILE
from tests.tasks.support import write_rows
from tests.trainer.command import train, write_config

DATED = (
    "{{ strftime_now('%d %b %Y') }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHAT = {
    "messages": [
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "mat", "id": 3},
    ],
    "source": "here",
}


def show(base: Path, *more: str) -> int:
    return main(
        ["data", "show", "--model", str(base), "--trainer-config", "tasks.json", *more]
    )  # fmt: skip


def test_rows_are_shown_as_the_model_sees_them(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"instruction": "cat", "output": "mat", "id": 1}, {"instruction": "a", "output": ""}
    write_rows(Path("data"), *rows, name="small")
    write_config(prompt="plain")
    assert show(place) == 0
    shown = capsys.readouterr().out
    assert "⟦<s>⟧cat\n{+mat⟦</s>⟧+}" in shown
    assert "data/small.jsonl: line 1" in shown and "id (1)" in shown
    assert "line 2: nothing to learn" in shown


def test_json_has_everything(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("data"), {"instruction": "cat" * 99, "output": "mat"}, name="small")
    write_config(prompt="plain")
    assert show(place, "--json", "--rows", "1") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["rows"] == task["sequences"] == 1 and task["max"] == 64
    (example,) = task["examples"]
    assert len(example["input_ids"]) == len(example["learned"]) == 64 < example["cut_from"]
    assert example["parts"][-1] == {"text": "</s>", "learned": True, "special": True}


def test_tokenised_data_need_no_tokenizer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(place / "config.json", bare)
    assert show(bare, "--json") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["examples"][0]["input_ids"] == list(range(3, 12))
    assert show(bare) == 0
    assert "{+" in capsys.readouterr().out
    write_rows(Path("data"), {"input_ids": [3, 300]}, name="small")
    assert show(bare) == 2
    assert "input_ids[1] = 300" in capsys.readouterr().err


def test_a_tokenizer_needs_no_weights(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    light = tmp_path / "light"
    shutil.copytree(place, light, ignore=shutil.ignore_patterns("*.safetensors"))
    write_rows(Path("data"), {"instruction": "a\x1b[31m", "output": "b\rc"}, name="small")
    assert show(light) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b[31m" in shown and "b\\rc" in shown


def test_mistakes_are_told_together(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(place, "--task", "smal", "--rows", "-1") == 2
    message = capsys.readouterr().err
    assert "did you mean 'small'" in message and "--rows -1" in message
    write_rows(Path("data"), *[{"instruction": 3}] * 600, name="small")
    assert show(place) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) <= 20 and "600 problems" in message


@pytest.mark.long
@pytest.mark.ranks
def test_a_runs_data_do_not_depend_on_the_clock(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "dated"
    shutil.copytree(place, base)
    (base / "chat_template.jinja").write_text(DATED)
    write_rows(Path("data"), CHAT, CHAT, name="small")
    write_config(steps=2)

    class Clock(date):
        day = date(2024, 2, 9)

        @classmethod
        def today(cls) -> Any:
            return cls.day

    monkeypatch.setattr(trained_tasks, "date", Clock)
    assert train(base, "--max-steps", "1", "--save-every", "1") == 0, capsys.readouterr().err
    Clock.day = date(2025, 3, 10)
    assert train(base, "--resume") == 0, capsys.readouterr().err
    assert yaml.safe_load(Path("run/config.yaml").read_text())["data_day"] == "2024-02-09"
    assert len(Path("run", METRICS_FILE).read_text().splitlines()) == 2
