from __future__ import annotations

from pathlib import Path

import pytest

from lobra.common import documents, yaml_text
from lobra.common.documents import read_document
from lobra.common.errors import ConfigError


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.json", '{\n "a": 1,\n "b" 2\n}', "line 3, column 6"),
        ("a.json", "", "line 1"),
        ("a.json", '{"a": 1, "a": 2}', "'a' is given twice"),
        ("a.json", '{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ("a.json", b'{"a": "\xff"}', "not UTF-8"),
        ("a.json", "[" * 200_000, "nested too deeply"),
        ("a.json", "1" * 5000, "integer"),
        ("a.yaml", "a: 1\nb: [1, 2\nc: 3", "line 3"),
        ("a.yaml", "a: 1\nb: 2\na: 3", "line 3: the field 'a' is given twice"),
        ("a.yaml", "a: !!python/object:os.system x", "line 1"),
        ("a.yaml", "a: &x\n  b: *x", "not valid YAML"),
        ("a.yaml", "a: 1\n---\nb: 2", "line 2"),
        ("a.yaml", "\x00", "not valid YAML"),
    ],
)
def test_mistakes_are_shown_with_their_place(
    tmp_path: Path, name: str, text: str | bytes, place: str
) -> None:
    path = written(tmp_path, name, text)
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ") and place in problem


def test_a_document_without_end_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.yaml", "# " + "a" * yaml_text.MOST_CHARACTERS + "\nb: 1\n")
    with pytest.raises(ConfigError, match="too large: 4194312 characters, want at most 4194304"):
        read_document(path)
    for name in ("a.yaml", "a.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(documents.MOST_BYTES + 1)  # a hole, which takes no room
        with pytest.raises(ConfigError, match="it has 268435457 bytes, want at most 268435456"):
            read_document(tmp_path / name)


def test_yaml_numbers_are_numbers_and_merge_keys_merge(tmp_path: Path) -> None:
    text = "base: &b {x: 1e-4, y: 3}\nit:\n  <<: *b\n  y: 2E+3\n  name: 1e\n  z: .5e1"
    assert read_document(written(tmp_path, "a.yaml", text)) == {
        "base": {"x": 1e-4, "y": 3},
        "it": {"x": 1e-4, "y": 2000.0, "name": "1e", "z": 5.0},
    }


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    assert read_document(written(tmp_path, "a.json", b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


def test_a_folder_is_no_document(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_document(tmp_path)
