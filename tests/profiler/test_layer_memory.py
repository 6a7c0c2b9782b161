"""What the shapes say a layer holds is what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.layout.shapes import ModelShape, read_shape
from lobra.layout.world import one_replica
from lobra.model.adapter import AdapterSpec
from lobra.model.dropout import TokenNoise
from lobra.model.groups import build_groups
from lobra.model.launch import run_ranks
from lobra.model.memory_policy import apply_policy
from lobra.model.packed_attention import Packing
from lobra.model.part import Part
from lobra.model.precision import DTYPES
from lobra.model.stage import build_stage
from lobra.model.token_tasks import Segment, TokenTasks
from lobra.profiler.layer_memory import LayerMemory
from lobra.tasks.target_modules import TARGET_MODULES
from tests.model.alive import Alive
from tests.model.support import save_llama

LENGTH = 256
LORA_RANK = 2
LLAMA_8B = ModelShape("8B", 32, 4096, 14336, 32, 8, 128, 128256)
AUTOGRAD = "autograd"  # no policy at all


def held_by_layers(
    folder: Path, precision: str, dropout: float, policy: str
) -> tuple[float, float]:
    """Return the bytes a token kept of all layers, and added by the backward pass of the last."""
    groups = build_groups(one_replica(Layout(dist.get_world_size(), 1)))
    specs = {0: AdapterSpec("one", LORA_RANK, 2.0, TARGET_MODULES, dropout)}
    built = build_stage(folder, groups, specs, dtype=DTYPES[precision])
    if policy != AUTOGRAD:
        apply_policy(built.decoder.layers, policy)
    dropouts = torch.full((LENGTH,), dropout)
    noise = TokenNoise.of_tokens(torch.arange(LENGTH), dropouts, built.dtype) if dropout else None
    built.selection.tasks = TokenTasks((Segment(0, 0, LENGTH),), noise)
    embedded = torch.randn(1, LENGTH, built.shape.hidden_size).to(built.dtype).requires_grad_()
    in_backward = []
    add_gradients = Part.add_gradients

    def noted(*args: Any) -> None:
        if not in_backward:
            in_backward.append(alive.num_bytes())
        add_gradients(*args)

    Part.add_gradients = noted  # type: ignore[method-assign]
    with Alive() as alive:
        output = built.decoder(
            inputs_embeds=embedded,
            position_ids=torch.arange(LENGTH)[None],
            attention_mask=None,
            use_cache=False,
            packing=None if policy == AUTOGRAD else Packing.of_lengths([LENGTH]),
        ).last_hidden_state
        kept = alive.num_bytes()
        output.sum().backward()
    Part.add_gradients = add_gradients  # type: ignore[method-assign]
    return kept / LENGTH, (in_backward[0] - kept) / LENGTH


def held_by_policy(
    folders: tuple[Path, Path], precision: str, dropout: float
) -> dict[str, tuple[float, float]]:
    """Return what a layer keeps and computes again under each policy, by models of 1 and 3."""
    held = {}
    for policy in (AUTOGRAD, *MEMORY_POLICIES):
        one, three = (held_by_layers(folder, precision, dropout, policy) for folder in folders)
        held[policy] = ((three[0] - one[0]) / 2, three[1])
    own = held[AUTOGRAD][1]  # gradients
    return {policy: (kept, again - own) for policy, (kept, again) in held.items()}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("precision", "tp", "dropout"),
    [
        pytest.param("fp32", 1, 0.0, marks=pytest.mark.long),
        ("bf16", 1, 0.1),
        pytest.param("fp32", 2, 0.1, marks=pytest.mark.long),
    ],
)
def test_what_a_layer_holds_is_what_the_shapes_say(
    tmp_path: Path, precision: str, tp: int, dropout: float
) -> None:
    folders = tuple(
        save_llama(
            tmp_path / f"{num_layers}",
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=num_layers,
        )
        for num_layers in (1, 3)
    )
    arguments = dict(folders=folders, precision=precision, dropout=dropout)
    held = run_ranks("tests.profiler.test_layer_memory:held_by_policy", tp, arguments)[0]
    shape = read_shape(folders[0])
    for policy, (kept_bytes, again_bytes) in held.items():
        alone = policy == AUTOGRAD
        memory = "keep" if alone else policy
        layer = LayerMemory(shape, tp, precision, LORA_RANK, memory, False, alone)
        assert layer.kept_bytes == pytest.approx(kept_bytes, rel=1e-3), policy
        # While the backward pass is in it; for bf16 and tp 2 the count is a query's width too high.
        in_backward = layer.kept_bytes + layer.held_again_bytes
        assert in_backward == pytest.approx(kept_bytes + again_bytes, rel=0.05), policy


@pytest.mark.parametrize(
    ("policy", "expected"), [("keep", 94_000), ("lean", 36_700), ("full", 8_200)]
)
def test_bytes_kept_of_an_8b_layer(policy: str, expected: int) -> None:
    """As `tests.model.test_memory_policy` counts them of living tensors."""
    layer = LayerMemory(LLAMA_8B, 1, "bf16", LORA_RANK, policy)
    assert layer.kept_bytes == pytest.approx(expected, rel=0.01)
