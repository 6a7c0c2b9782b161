"""What a stage's slot holds of an adapter is what planning counts of it."""

from __future__ import annotations

from itertools import chain

import pytest

from lobra.layout.shapes import NAMED_SHAPES
from lobra.layout.world import adapted_layers, stage_layers
from lobra.model.adapter import AdapterSpec
from lobra.model.flat_tensors import FlatTensors
from lobra.tasks.target_modules import ADAPTED_MODULES, TARGET_MODULES

SHAPE = NAMED_SHAPES["tiny"]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize(
    "modules", [TARGET_MODULES, ADAPTED_MODULES, ("lm_head",), ("embed_tokens", "o_proj")], ids=len
)
def test_elements_of_stages(num_stages: int, modules: tuple[str, ...]) -> None:
    spec = AdapterSpec("x", 3, 3.0, modules)
    stages = [
        adapted_layers(stage_layers(SHAPE.num_layers, num_stages, stage), SHAPE.num_layers)
        for stage in range(num_stages)
    ]
    assert list(chain(*stages)) == list(SHAPE.adapted_layers)
    for layers in stages:
        held = FlatTensors.of_layers(spec, SHAPE, layers)
        assert held.numel == SHAPE.adapter_elements(3, modules, layers)
        assert held.span(layers) == slice(0, held.numel)
    whole = FlatTensors.whole(spec, SHAPE)
    assert whole.numel == SHAPE.adapter_elements(3, modules)
    assert [whole.span(layers).start for layers in stages] == [
        sum(SHAPE.adapter_elements(3, modules, before) for before in stages[:place])
        for place in range(num_stages)
    ]
