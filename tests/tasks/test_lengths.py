from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lobra.common.errors import ConfigError
from lobra.tasks.lengths import load_lengths


def test_json_and_folder_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps({"a": [3, 1, 2], "b": [7]}))
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "a.npy", np.array([3, 1, 2], dtype=np.int32))
    np.save(tmp_path / "folder" / "b.npy", np.array([7], dtype=np.uint16))
    for path in (tmp_path / "l.json", tmp_path / "folder"):
        lengths = load_lengths(path)
        assert {name: values.tolist() for name, values in lengths.items()} == {
            "a": [3, 1, 2],
            "b": [7],
        }
        assert all(values.dtype == np.int64 for values in lengths.values())


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    path.write_text(
        json.dumps({"a": [1, True], "b": [], "c": [4, 0], "d": 5, "e": [2**70], "f": [1]})
    )
    with pytest.raises(ConfigError) as caught:
        load_lengths(path)
    problems = caught.value.problems
    assert len(problems) == 5
    for task, problem in zip(("a[1]", "b", "c[1]", "d", "e"), problems, strict=True):
        assert f"{path}: {task}" in problem


@pytest.mark.parametrize("text", ["{", "[1, 2]", "{}", "\xff"])
def test_a_file_that_is_no_object_of_lists(tmp_path: Path, text: str) -> None:
    path = tmp_path / "l.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="l.json"):
        load_lengths(path)


def test_folders_without_or_with_wrong_arrays(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no .npy file"):
        load_lengths(tmp_path)
    np.save(tmp_path / "a.npy", np.array([1.5]))
    np.save(tmp_path / "b.npy", np.array([[1]]))
    with pytest.raises(ConfigError) as caught:
        load_lengths(tmp_path)
    assert len(caught.value.problems) == 2
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match=r"c\.npy"):
        load_lengths(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no lengths at"):
        load_lengths(tmp_path / "missing.json")


def test_the_shared_lengths_load(shared: Path) -> None:
    lengths = load_lengths(shared / "lengths" / "lobra_like_6tasks.json")
    assert len(lengths) == 6 and all(len(values) == 20_000 for values in lengths.values())
