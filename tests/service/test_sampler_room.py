"""Samples take what ranks leave; a request for many is drawn in parts, which is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lobra.layout.shapes import resolve_shape
from lobra.service import sampler_room as room
from lobra.service.sampler import Sampler, SampleRequest

GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_devices", "budget_gib", "device"),
    [(2, 72, "cuda:1"), (1, 50, "cuda:0"), (1, 72, "cpu")],
)
def test_where_it_is(
    num_devices: int, budget_gib: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {"memory_bytes": 80 * GIB, "num_devices": num_devices}
    monkeypatch.setattr(room, "describe_device", lambda device: described)
    run = SimpleNamespace(device="cuda", world_size=1, precision="bf16")
    admission = SimpleNamespace(budget_bytes=budget_gib * GIB)
    deployment: Any = SimpleNamespace(run=run, shape=resolve_shape("7B"), admission=admission)
    found = room.sampler_room(deployment)
    assert found.device == device
    model_bytes = room.model_copy_bytes(deployment.shape, "bf16")
    assert model_bytes == pytest.approx(13.5e9, rel=0.01)
    if device == "cuda:0":
        assert found.free_bytes == 30 * GIB - model_bytes


def test_what_is_drawn_in_parts_is_the_same(base: Path) -> None:
    sampler = Sampler(base, "fp64", "cpu")
    request = SampleRequest(
        np.array([5, 6, 7], np.int32), 7, 4, 1.0, -1, 1.0, 3, (), (), True, None, row_bytes=100
    )
    other = replace(request, num_samples=2, seed=9)
    whole = sampler.sample([request, other])
    sampler.free_bytes = 250
    sizes: list[int] = []
    plain = sampler._sample

    def noted(batch: list[SampleRequest]) -> Any:
        sizes.append(sum(piece.num_samples for piece in batch))
        return plain(batch)

    sampler._sample = noted  # type: ignore[method-assign]
    parts = sampler.sample([request, other])
    assert max(sizes) == 2 and sum(sizes) == 9
    for one, two in zip(whole, parts, strict=True):
        assert [s.tokens for s in one.sequences] == [s.tokens for s in two.sequences]
        np.testing.assert_allclose(one.prompt_logprobs[1:], two.prompt_logprobs[1:], atol=1e-5)
