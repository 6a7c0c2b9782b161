"""Any loader, given anything, returns a value or raises `ConfigError`; nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lobra.common.documents import read_document
from lobra.common.errors import ConfigError
from lobra.layout.plan import load_plan
from lobra.layout.shapes import read_shape
from lobra.model.checkpoint import opened, tensor_files
from lobra.profiler.accelerators import load_tables
from lobra.profiler.collectives import COLLECTIVE_COLUMNS, load_collectives
from lobra.profiler.head import load_head_profile
from lobra.profiler.profiles import load_memory_profile, load_time_profiles, no_use
from lobra.profiler.sidecar import read_meta
from lobra.profiler.sweep_rows import read_sweep
from lobra.report.experiment_tables import read_experiment
from lobra.report.run_summary import summarise
from lobra.tasks.dataset import TokenizedDataset
from lobra.tasks.lengths import load_lengths
from lobra.tasks.row_format import Reading
from lobra.tasks.rows import read_rows
from lobra.tasks.task_file import load_trainer_config
from lobra.trainer.checkpoint import read_state
from lobra.trainer.host_file import read_host_file
from lobra.trainer.metrics import kept_metrics, read_metrics
from lobra.trainer.peft_config import config_problems
from lobra.trainer.run_config import read_run_config
from tests.assets.golden import HERE as GOLDEN
from tests.bad_inputs.case import FORMATS
from tests.tiers import examples

PROFILE = FORMATS / "exp_result/profile"


@dataclass(frozen=True)
class Loader:
    """A loader, the file it is given (below a folder), and a good one."""

    load: Callable[[Path], Any]
    name: str
    good: bytes = b"{}"


def _times(path: Path) -> None:
    for profile in load_time_profiles(path).values():
        no_use(profile)


def _adapter(path: Path) -> None:
    document = read_document(path)
    if isinstance(document, dict):
        config_problems(document)


def _rows(path: Path) -> None:
    reading = Reading(
        prompt="auto", json_key=None, train_on_inputs=False, max_rows=None, vocab_size=100,
        specials=_none, chat=_none,
    )  # fmt: skip
    with suppress(_NoTokenizerError):
        read_rows(path, reading)


class _NoTokenizerError(Exception):
    """Rows that are texts were read so far that a tokenizer is asked for."""


def _none() -> Any:
    raise _NoTokenizerError


def _loader(load: Callable[[Path], Any], name: str, good: Path) -> Loader:
    return Loader(load, name, good.read_bytes())


_TIMES = PROFILE / "cost_model/profile_time_base.csv"
_RUN = FORMATS / "run"
_ROWS = GOLDEN / "data/short.jsonl"
LOADERS = {
    "json": Loader(read_document, "a.json"),
    "yaml": _loader(read_document, "a.yaml", _RUN / "config.yaml"),
    "tasks": _loader(load_trainer_config, "tasks.json", FORMATS / "tasks.json"),
    "tasks-yaml": _loader(load_trainer_config, "tasks.yaml", FORMATS / "tasks.json"),
    "plan": _loader(load_plan, "plan.yaml", FORMATS / "plan.yaml"),
    "shape": _loader(
        lambda path: read_shape(path.parent), "config.json", GOLDEN / "base/config.json"
    ),
    "times": _loader(_times, "t.csv", _TIMES),
    "memory": _loader(
        load_memory_profile, "m.csv", PROFILE / "memory/max_tokens_base_2tasks.csv"
    ),
    "links": _loader(
        load_collectives, "c.csv", PROFILE / "cost_model/profile_collectives_base.csv"
    ),
    "head": _loader(load_head_profile, "h.csv", PROFILE / "cost_model/profile_head_base.csv"),
    "sidecar": _loader(
        lambda path: read_meta(path.with_name("t.csv")), "t.meta.json",
        _TIMES.with_suffix(".meta.json"),
    ),
    "sweep": _loader(
        lambda path: read_sweep(path, COLLECTIVE_COLUMNS, 3, {}, "keep"), "s.csv",
        PROFILE / "cost_model/profile_collectives_base.csv",
    ),
    "lengths": Loader(load_lengths, "lengths.json", b'{"a": [1, 2]}'),
    "lengths-npy": Loader(lambda path: load_lengths(path.parent), "a.npy", b"\x93NUMPY\x01\x00"),
    "accelerators": Loader(load_tables, "a.yaml", b"accelerators: {a: {memory_gib: 3}}"),
    "index": Loader(
        lambda path: tensor_files(path.parent), "model.safetensors.index.json",
        b'{"weight_map": {"a": "b.safetensors"}}',
    ),
    "weights": _loader(opened, "w.safetensors", GOLDEN / "start/few/adapter_model.safetensors"),
    "adapter": _loader(_adapter, "a.json", GOLDEN / "start/few/adapter_config.json"),
    "rows": _loader(_rows, "a.jsonl", _ROWS),
    "array": Loader(_rows, "a.json", b'[{"input_ids": [1, 2]}]'),
    "csv": Loader(_rows, "a.csv", b"instruction,output\na,b\n"),
    "parquet": Loader(_rows, "a.parquet", b"PAR1"),
    "hosts": Loader(read_host_file, "hosts", b"a slots=2\nb slots=3\n"),
    "state": _loader(
        lambda path: read_state(path.parents[2], None), "checkpoints/step_2/state.json",
        _RUN / "checkpoints/step_2/state.json",
    ),
    "metrics": _loader(
        lambda path: read_metrics(path.parent), "metrics.jsonl", _RUN / "metrics.jsonl"
    ),
    "kept": _loader(
        lambda path: kept_metrics(path.parent, 2, {"step": 1}), "metrics.jsonl",
        _RUN / "metrics.jsonl",
    ),
    "run": _loader(lambda path: read_run_config(path.parent), "config.yaml", _RUN / "config.yaml"),
    "tokenised": Loader(
        lambda path: TokenizedDataset.load(path.parent), "counts.json", b'{"num_truncated": 1}'
    ),
    "simulation": Loader(
        lambda path: read_experiment(path.parent), "simulation.json", b'[{"name": "a"}]'
    ),
}  # fmt: skip

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["strategy_config", "task", "settings", 10**30, "²", "nan", "\udcff"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["task", "dp", "rows"]), inner)
    ),
    max_leaves=12,
)


@st.composite
def documents(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes; values as JSON or YAML; a good document with another value; a good file bent."""
    kind = draw(st.sampled_from(["bytes", "json", "yaml", "other value", "bent"]))
    if kind == "bytes":
        return draw(st.binary(max_size=64))
    if kind in ("json", "yaml"):
        return _written(draw(PLAIN), kind)
    if kind == "other value":
        try:
            document = yaml.safe_load(good)
        except (yaml.YAMLError, UnicodeDecodeError):
            document = None
        return _written(_changed(draw, document), "json")
    start = draw(st.integers(0, len(good)))
    end = min(len(good), start + draw(st.integers(0, 12)))
    return good[:start] + draw(st.binary(max_size=4)) + good[end:]


def _changed(draw: st.DrawFn, document: Any) -> Any:
    """Return a document with another value somewhere in it."""
    if isinstance(document, dict | list) and document and draw(st.integers(0, 5)):
        places = sorted(document, key=str) if isinstance(document, dict) else range(len(document))
        place = draw(st.sampled_from(places))
        document = document.copy()
        document[place] = _changed(draw, document[place])
        return document
    return draw(PLAIN)


def _written(value: Any, kind: str) -> bytes:
    text = json.dumps(value, default=str) if kind == "json" else yaml.safe_dump(value)
    return text.encode(errors="surrogatepass")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@pytest.mark.parametrize("kind", LOADERS)
@examples(12, 500)
@given(data=st.data())
def test_any_content_is_read_or_refused(kind: str, folder: Path, data: st.DataObject) -> None:
    loader = LOADERS[kind]
    path = folder / kind / loader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.draw(documents(loader.good)))
    try:
        loader.load(path)
    except ConfigError as error:
        assert str(path) in str(error) or path.parent.name in str(error)
    assert os.listdir(path.parent) == [path.name], "nothing is written"


@examples(6, 200)
@given(data=st.data())
def test_any_run_is_reported_or_refused(folder: Path, data: st.DataObject) -> None:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    for name in ("config.yaml", "metrics.jsonl"):
        good = (_RUN / name).read_bytes()
        (run / name).write_bytes(data.draw(st.just(good) | documents(good)))
    try:
        summarise(run)
    except ConfigError as error:
        assert "run" in str(error)
