from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.corpus import EMBEDDED
from lobra.tasks.sources import PUBLISHED, resolve_dataset
from tests.tasks.support import write_rows


def no_hub(*_: Any, **__: Any) -> Any:
    raise ConnectionError("the hub is not reachable")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put a hub of our own in the place of the package `datasets`."""
    fake = SimpleNamespace(load_dataset=no_hub)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "data", {"text": "a"}, name="mine")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "mine.jsonl", "data/mine.jsonl", str(path)):
        assert resolve_dataset(name, "data").resolve() == path


def test_the_data_folder_comes_before_the_embedded_task(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"text": "a"}, name=EMBEDDED[0])
    assert resolve_dataset(EMBEDDED[0], tmp_path) == path


def test_embedded_tasks_are_mined_when_asked_for(tmp_path: Path) -> None:
    path = resolve_dataset(EMBEDDED[1], tmp_path / "data")
    assert path == tmp_path / "data" / f"{EMBEDDED[1]}.jsonl" and path.stat().st_size > 10_000


def test_what_is_missing_is_said_with_where_and_how(tmp_path: Path) -> None:
    write_rows(tmp_path, {"text": "a"}, name="gsm8k")
    with pytest.raises(ConfigError) as caught:
        resolve_dataset("gsm8", tmp_path)
    text = str(caught.value)
    assert str(tmp_path / "gsm8.jsonl") in text and "did you mean 'gsm8k'" in text
    for name in PUBLISHED:
        with pytest.raises(ConfigError, match=f"create_finetune_datasets.sh {name}$"):
            resolve_dataset(name, tmp_path)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", ".", "/", "no/such/file.jsonl", "a b/c"])
def test_names_no_file_can_have(tmp_path: Path, name: str, hub: SimpleNamespace) -> None:
    with pytest.raises(ConfigError):
        resolve_dataset(name, tmp_path)


def test_hub_names_are_fetched_once(tmp_path: Path, hub: SimpleNamespace) -> None:
    calls = []

    def load(name: str, configuration: str | None, split: str) -> list[dict[str, str]]:
        calls.append((name, configuration, split))
        return [{"instruction": "grün", "output": "x"}]

    hub.load_dataset = load
    path = resolve_dataset("owner/some-set:1.0.0", tmp_path)
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {"instruction": "grün", "output": "x"}
    ]
    assert resolve_dataset("owner/some-set:1.0.0", tmp_path) == path
    assert calls == [("owner/some-set", "1.0.0", "train")]
    assert path.parent == tmp_path


def test_a_hub_that_fails_leaves_nothing(tmp_path: Path, hub: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"owner/set.*ConnectionError"):
        resolve_dataset("owner/set", tmp_path)

    def breaks(*_: Any, **__: Any) -> Any:
        yield {"text": "a"}
        raise ConnectionError("cut")

    hub.load_dataset = breaks
    with pytest.raises(ConfigError, match="cut"):
        resolve_dataset("owner/set", tmp_path)
    assert list(tmp_path.iterdir()) == []
