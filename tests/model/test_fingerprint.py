"""Another base model is told apart by any of its tensors, at bounded cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobra.common.errors import ConfigError
from lobra.layout.shapes import read_shape
from lobra.model import fingerprint as module
from lobra.model.checkpoint import needed_tensors
from lobra.model.fingerprint import fingerprint
from tests.model.support import save_llama

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose file begins with a head of 2 MiB: what came after was once not looked at."""
    return save_llama(tmp_path_factory.mktemp("fingerprint") / "base", vocab_size=8192)


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "other"))


def of(folder: Path, like: str = module.MARK) -> str:
    return fingerprint(folder, read_shape(folder), like)


@pytest.mark.parametrize("budget", [module.MOST_BYTES, 1 << 18])
def test_every_tensor_counts(
    base: Path, other: Path, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", budget)
    monkeypatch.setattr(module, "PIECE_BYTES", 512)
    before = of(base)
    assert of(other) == before
    tensors = load_file(base / WEIGHTS)
    assert len(tensors) == 39
    for name, value in tensors.items():
        for changed in (value * 1.001, value.half()):
            save_file({**tensors, name: changed}, other / WEIGHTS, metadata={"format": "pt"})
            assert of(other) != before, f"{name} has changed"


def test_what_is_read_of_a_large_model_is_bounded(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    plain = module._read

    def counted(descriptor: int, start: int, size: int, path: Path) -> bytes:
        read.append(size)
        return plain(descriptor, start, size, path)

    monkeypatch.setattr(module, "_read", counted)
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 18)
    monkeypatch.setattr(module, "PIECE_BYTES", 512)
    of(base)
    assert 39 * 512 <= sum(read) <= 1 << 18
    assert sum(read) < (base / WEIGHTS).stat().st_size / 10


def test_pieces_begin_at_the_first_byte_and_end_at_the_last() -> None:
    for size in (1, module.PIECE_BYTES * 5, module.PIECE_BYTES * 5 + 1, 10**9):
        pieces = module._spread(size, 5)
        assert pieces[0][0] == 0 and sum(pieces[-1]) == size
        assert sum(length for _, length in pieces) <= module.PIECE_BYTES * 5


def test_how_tensors_lie_in_files_and_who_wrote_them_does_not_count(
    base: Path, other: Path
) -> None:
    tensors = load_file(base / WEIGHTS)
    names = sorted(tensors, reverse=True)
    files = {}
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        save_file(part, other / f"part_{number}.safetensors")
        files.update(dict.fromkeys(part, f"part_{number}.safetensors"))
    (other / WEIGHTS).unlink()
    (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    config = json.loads((other / "config.json").read_text())
    config["transformers_version"] = "0"
    (other / "config.json").write_text(json.dumps(config))
    assert of(other) == of(base)
    config["rms_norm_eps"] = 1e-3
    (other / "config.json").write_text(json.dumps(config))
    assert of(other) != of(base)


def test_tensors_the_model_does_not_use_do_not_count(base: Path, other: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    needed = needed_tensors(base, read_shape(base))
    assert needed.keys() == tensors.keys()
    save_file({**tensors, "vision.weight": torch.ones(2)}, other / WEIGHTS)
    assert of(other) == of(base)


def test_a_fingerprint_of_the_former_kind_is_made_for_comparison(base: Path, other: Path) -> None:
    old = of(base, like="0123456789abcdef")
    assert len(old) == 16 and of(other, like=old) == old
    tensors = load_file(base / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, other / WEIGHTS)
    assert of(other, like=old) != old


def test_a_damaged_file_is_named(base: Path, other: Path) -> None:
    with (other / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match=WEIGHTS):
        of(other)
