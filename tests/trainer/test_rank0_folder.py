"""What rank 0 alone has on its file system, all ranks get; where all see it, they read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from lobra.model.launch import run_ranks
from lobra.trainer.rank0_folder import Rank0Folder

DTYPES = (torch.float64, torch.bfloat16)
HERE = "tests.trainer.test_rank0_folder"


def read_as_rank(folders: list[str]) -> tuple[bool, dict[str, tuple[torch.dtype, list]]]:
    """Read a tensor of this rank's and one of all; each rank's path leads to another folder."""
    rank = dist.get_rank()
    group = dist.new_group(backend="gloo")
    assert group is not None
    folder = Rank0Folder(Path(folders[rank]), "mark", group)
    found = folder.tensors("some.safetensors", {f"of.{rank}", "of.all"})
    # no tensors: they would be fetched from this process, which may have ended
    return folder.is_shared, {key: (own.dtype, own.tolist()) for key, own in found.items()}


@pytest.mark.ranks
@pytest.mark.parametrize("others", ["shared", "gone", "another's"])
def test_every_rank_gets_what_rank_0_has(tmp_path: Path, others: str) -> None:
    stored = {"of.all": torch.arange(6, dtype=DTYPES[0]).view(2, 3) / 3}
    stored |= {f"of.{rank}": torch.full((3,), rank + 0.5, dtype=DTYPES[1]) for rank in range(2)}
    for name, mark in (("shared", "ours"), ("another's", "theirs")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mark").write_text(mark)
        save_file(stored, tmp_path / name / "some.safetensors")
        stored_there = {key: torch.zeros_like(value) for key, value in stored.items()}
        save_file(
            stored if name == "shared" else stored_there, tmp_path / name / "some.safetensors"
        )
    folders = [str(tmp_path / "shared"), str(tmp_path / others)]
    results = run_ranks(f"{HERE}:read_as_rank", 2, {"folders": folders})
    for rank, (is_shared, found) in enumerate(results):
        assert is_shared == (others == "shared")
        assert found.keys() == {f"of.{rank}", "of.all"}
        for key, own in found.items():
            assert own == (stored[key].dtype, stored[key].tolist())
