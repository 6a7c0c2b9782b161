"""Tokenised data are kept between runs, and made again whenever anything they rest on changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.tasks import cache
from lobra.tasks.dataset import TokenizedDataset, load_dataset
from lobra.tasks.encoding import Encoder
from lobra.tasks.text_processor import TextProcessor
from tests.tasks.support import CHATML, small_tokenizer, task, write_rows

ROWS = [{"instruction": f"say {k}", "output": f"cat {k}", "id": k} for k in range(5)]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that are tokenised; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small_tokenizer(tmp_path / "model")
    write_rows(tmp_path / "data", *ROWS)
    counts: list[int] = []
    plain = Encoder.encode

    def counted(self: Encoder, rows: Any) -> Any:
        counts.append(len(rows))
        return plain(self, rows)

    monkeypatch.setattr(Encoder, "encode", counted)
    return counts


def load(tmp_path: Path, **changes: Any) -> TokenizedDataset:
    processor = TextProcessor.of_folder(lambda: tmp_path / "model")
    return load_dataset(task(**changes), processor, tmp_path / "data")


def test_a_second_run_tokenises_nothing(tmp_path: Path, made: list[int]) -> None:
    first, second = load(tmp_path), load(tmp_path)
    assert made == [5]
    for name in ("tokens", "labels", "offsets"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.report is not None and second.report is not None
    assert first.report == second.report and first.report.remarks() == second.report.remarks()
    assert first.rows().tolist() == second.rows().tolist()


@pytest.mark.parametrize(
    "change", ["data", "setting", "tokenizer", "template", "damage", "code", "report"]
)
def test_whatever_changes_it_is_made_again(
    tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    load(tmp_path)
    (entry,) = cache.cache_folder().iterdir()
    changes: dict[str, Any] = {}
    if change == "data":
        write_rows(tmp_path / "data", *ROWS[:4])
    elif change == "setting":
        changes = {"prompt": "plain"}
    elif change == "tokenizer":
        path = tmp_path / "model" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"x": 1}))
    elif change == "template":
        (tmp_path / "model" / "chat_template.jinja").write_text(CHATML)
    elif change == "code":
        monkeypatch.setattr(cache, "_code_digest", lambda: "other")
    else:
        (entry / {"damage": "tokens.npy", "report": "report.json"}[change]).write_bytes(b"{}")
    load(tmp_path, **changes)
    assert len(made) == 2


def test_settings_of_training_do_not_matter(tmp_path: Path, made: list[int]) -> None:
    load(tmp_path)
    load(tmp_path, rank=8, learning_rate=1.0, name="other")
    assert made == [5]


def test_the_day_matters_only_to_a_template_that_asks_for_it(
    tmp_path: Path, made: list[int]
) -> None:
    from datetime import date

    folder = tmp_path / "model"
    for template, expected in ((CHATML, 1), ("{{ strftime_now('%Y') }}" + CHATML, 2)):
        (folder / "chat_template.jinja").write_text(template)
        digests = {
            TextProcessor.of_folder(lambda: folder, date(2024, 1, day)).digest for day in (1, 2)
        }
        assert len(digests) == expected


def test_mistakes_are_not_kept(tmp_path: Path, made: list[int]) -> None:
    write_rows(tmp_path / "data", {"instruction": 3, "output": "x"})
    for _ in range(2):
        with pytest.raises(ConfigError, match="instruction = 3"):
            load(tmp_path)


def test_a_cache_that_cannot_be_written_is_no_mistake(
    tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(tmp_path)) == len(load(tmp_path)) == 5
    assert made == [5, 5]


def test_the_oldest_entries_go_first(
    tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 1)
    for prompt in ("plain", "alpaca", "plain"):
        load(tmp_path, prompt=prompt)
        assert len(list(cache.cache_folder().iterdir())) == 1
    assert made == [5, 5, 5]
