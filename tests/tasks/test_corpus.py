from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.tasks import corpus as corpus_module
from lobra.tasks.corpus import EMBEDDED, _mine, _modules, corpus_texts, ensure_corpus, mine_corpus
from lobra.tasks.dataset import load_dataset
from lobra.tasks.task_file import load_trainer_config
from lobra.tasks.tokenizer import load_tokenizer, train_tokenizer
from tests.tasks.support import save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the corpus and its tokenizer of 2048 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    ensure_corpus(folder)
    save_tokenizer(train_tokenizer(corpus_texts(), 2048), folder / "tokenizer")
    return folder


def test_every_task_has_hundreds_to_thousands_of_different_rows(folder: Path) -> None:
    assert set(ensure_corpus(folder)) == set(EMBEDDED) == set(mine_corpus())
    for path in ensure_corpus(folder).values():
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        assert 200 <= len(rows) <= 10_000
        assert len({json.dumps(row) for row in rows}) == len(rows)
        assert all(set(row) == {"instruction", "input", "output"} for row in rows)
        assert all(row["instruction"] and row["output"].strip() for row in rows)


def test_lengths_are_heavy_tailed(folder: Path, project_root: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert len(tokenizer) == 2048
    config = load_trainer_config(project_root / "trainer_config" / "quickstart.json")
    datasets = [load_dataset(task, tokenizer, folder) for task in config.tasks]
    lengths = np.concatenate([data.lengths for data in datasets])
    assert lengths.max() >= 20 * np.median(lengths)
    # By nature: also without the cut, which touches very few.
    assert sum(data.num_truncated for data in datasets) < 0.01 * len(lengths)
    assert all(data.num_dropped == 0 for data in datasets)
    # The four differ, as tenants do.
    medians = [float(np.median(data.lengths)) for data in datasets]
    assert max(medians) > 4 * min(medians)


def test_the_same_bytes_in_another_process(folder: Path, project_root: Path) -> None:
    program = (
        "import hashlib, json, sys\nfrom lobra.tasks.corpus import mine_corpus\n"
        "print(hashlib.sha256(json.dumps(mine_corpus()).encode()).hexdigest())"
    )
    import hashlib

    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=project_root,
        env={"PYTHONHASHSEED": "7"},
    )
    here = hashlib.sha256(json.dumps(mine_corpus()).encode()).hexdigest()
    assert result.stdout.strip() == here


def test_only_what_is_missing_is_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / f"{EMBEDDED[0]}.jsonl").write_text("mine")
    paths = ensure_corpus(tmp_path)
    assert paths[EMBEDDED[0]].read_text() == "mine"
    for name in EMBEDDED[1:]:
        assert paths[name].read_bytes() == (folder / f"{name}.jsonl").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_the_answer_is_not_in_the_question() -> None:
    corpus = mine_corpus()
    for example in corpus["stdlib_docstring"]:
        assert f'"""{example["output"]}"""' not in example["input"]
    for example in corpus["stdlib_signature"]:
        ast.parse(example["output"].removesuffix(":") + ": pass")
        assert example["output"].split("(")[0].split()[-1] in example["instruction"]


def test_form_feeds_do_not_shift_lines(tmp_path: Path) -> None:
    source = 'import os\n\f\n\f\ndef half(x):\n    """Return a half."""\n    return x / 2\n'
    (tmp_path / "module.py").write_text(source)
    examples, *_ = _mine(next(_modules(tmp_path)))
    assert [e["input"] for e in examples] == ["def half(x):\n    return x / 2"]


def test_code_without_its_docstring_is_still_code() -> None:
    broken = 0
    examples = mine_corpus()["stdlib_docstring"]
    for example in examples[::7]:
        try:
            ast.parse(example["input"])
        except SyntaxError:
            broken += 1  # continuation lines of a text may start left of the function
    assert broken < 0.005 * len(examples)


@pytest.mark.long
def test_mining_is_quick() -> None:
    start = time.process_time()
    mine_corpus.__wrapped__()  # the function without its cache
    assert time.process_time() - start < 10  # about 2.5 s on one core


def test_a_library_without_sources_is_a_clear_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def empty(*_: Any) -> str:
        return str(tmp_path)

    monkeypatch.setattr(corpus_module.sysconfig, "get_path", empty)
    monkeypatch.setattr(corpus_module, "mine_corpus", mine_corpus.__wrapped__)
    with pytest.raises(ConfigError, match="source files"):
        ensure_corpus(tmp_path / "data")
    assert not (tmp_path / "data").exists()


SOURCE = '''"""First line
of the module.

More."""

class A(B, metaclass=M):
    """What A is. And more."""

    @staticmethod
    def run(x, *, y: int = 1) -> str:
        """Run it.

        Details.
        """
        return "a"

    async def wait(self):
        "Wait."

def bare(): "one line"

if True:
    def _private():
        """Private."""
        def inner():
            """Inner."""
            return 1
        return inner
'''


def test_what_is_mined_from_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(SOURCE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "other.py").write_text('def t():\n    """Left out."""\n    return 1\n')
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda _: str(tmp_path))
    corpus = mine_corpus.__wrapped__()
    (module,) = corpus["stdlib_module"]
    assert module["instruction"] == "What is the module pkg for?"
    assert module["output"] == "First line\nof the module."
    assert module["input"].splitlines() == [
        "class A(B):",
        "    def run(x, *, y: int=1) -> str:",
        "    async def wait(self):",
        "def bare():",
        "def _private():",
    ]
    assert [example["output"] for example in corpus["stdlib_oneliner"]] == [
        "What A is.",
        "Run it.",
        "Wait.",
        "one line",
        "Private.",
    ]
    assert [example["output"] for example in corpus["stdlib_signature"]] == [
        "def run(x, *, y: int=1) -> str:",
        "async def wait(self):",
        "def bare():",
        "def _private():",
    ]
    first, second = corpus["stdlib_docstring"]
    assert first["input"] == 'def run(x, *, y: int = 1) -> str:\n    return "a"'
    assert first["output"] == "Run it.\n\nDetails."
    assert "def inner():" in second["input"] and second["output"] == "Private."
