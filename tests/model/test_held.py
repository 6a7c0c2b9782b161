"""The ranks of a replica hold every element of a model, and keep each of them once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lobra.layout.layout import Layout
from lobra.layout.shapes import read_shape
from lobra.layout.world import one_replica
from lobra.model.checkpoint import as_slice, needed_tensors
from lobra.model.held import held_tensors, owned_tensors
from tests.model.support import save_family


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "granite", "phi3", "glm"]
)
@pytest.mark.parametrize("layout", [Layout(1, 1), Layout(2, 2)], ids=str)
def test_every_element_has_one_owner(family: str, layout: Layout, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path / family)
    shape, sizes = read_shape(folder), needed_tensors(folder, read_shape(folder))
    counts = {name: np.zeros(size) for name, size in sizes.items()}
    world = one_replica(layout)
    for rank in range(world.num_ranks):
        place = world.place(rank)
        owned = owned_tensors(held_tensors(sizes, shape, place), place)
        for tensor in owned:
            for rows in tensor.stored_rows:
                counts[tensor.name][(as_slice(rows), *tensor.parts[1:])] += 1
        decays = [tensor.decays for tensor in owned]
        assert decays == sorted(decays, reverse=True)
    for name, count in counts.items():
        assert (count == 1).all(), name
