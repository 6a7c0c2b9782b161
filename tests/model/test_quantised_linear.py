"""Shards of quantised linears have the values that bitsandbytes makes of whole weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobra.common.errors import ConfigError
from lobra.layout.base_precision import QUANTISED
from lobra.layout.layout import Layout
from lobra.layout.shapes import layout_problem, module_path, read_shape
from lobra.layout.world import one_replica
from lobra.model.checkpoint import CheckpointReader, checkpoint_problems
from lobra.model.fingerprint import fingerprint
from lobra.model.groups import ReplicaGroups
from lobra.model.quantised_linear import read_linear
from lobra.model.sharded_layer import linear_shards
from lobra.model.stage import Stage, build_stage
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_memory import Adapters, estimate_memory
from tests.model.quantised import as_the_library_makes_it, save_quantised
from tests.model.support import micro_batch, save_family, tensors_of

CPU = torch.device("cpu")
NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "phi3"])  # the others' linears are as Llama's
@pytest.mark.parametrize("quantised", QUANTISED)
def test_shards_together_are_what_the_library_makes_of_the_whole(
    quantised: str, family: str, tp: int, tmp_path: Path
) -> None:
    """Of 192 inputs two GPUs have one and a half blocks each; of 64 four have a quarter."""
    base = save_family(family, tmp_path, intermediate_size=192)
    shape = read_shape(base).kept_in(quantised)
    assert layout_problem(shape, tp, 1) is None
    stored = load_file(base / "model.safetensors")
    shards = [linear_shards(shape, tp, index) for index in range(tp)]
    for dtype in (torch.float32, torch.float64):
        reader = CheckpointReader(base, dtype, CPU)
        for module in shape.linear_sizes():
            name, fused = f"model.layers.1.{module_path(module)}", shape.fused_linears().get(module)
            expected = as_the_library_makes_it(stored[f"{name}.weight"], quantised)
            for own in shards:
                linear = read_linear(reader, name, own[module], quantised, fused)
                rows = torch.cat(
                    [torch.arange(part.start, part.stop) for part in own[module].stored_rows(fused)]
                )
                columns = own[module].inputs
                theirs = expected[rows.sort().values, columns.start : columns.stop]
                ours = linear.weight_oi()
                assert ours.dtype == dtype
                if fused is not None:  # a checkpoint's order, not ours
                    groups = ours.unflatten(0, (-1, sum(fused.widths))).split(fused.widths, dim=1)
                    ours = torch.cat([part.flatten(0, 1) for part in groups])
                assert torch.equal(ours, theirs.to(dtype))


def test_blocks_that_reach_over_rows_are_for_one_gpu(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path, intermediate_size=96)
    shape = read_shape(base).kept_in("nf4")
    reader, name = CheckpointReader(base, torch.float32, CPU), "model.layers.0.mlp.down_proj"
    linear = read_linear(reader, name, linear_shards(shape, 1, 0)["down_proj"], "nf4")
    stored = load_file(base / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(linear.weight_oi(), as_the_library_makes_it(stored, "nf4"))
    assert layout_problem(shape, 1, 2) is None
    assert "a row of down_proj has 96 values" in (layout_problem(shape, 2, 1) or "")
    assert layout_problem(shape.kept_in(None), 2, 1) is not None
    assert layout_problem(read_shape(base).kept_in("int8"), 2, 1) is None


def stage_of(
    folder: Path,
    layout: Layout,
    rank: int = 0,
    quantised: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Stage:
    """Return the stage of one rank of a replica, alone; its activations are of this dtype."""
    place = one_replica(layout).place(rank)
    groups = ReplicaGroups(place, None, (rank,), None, (0, 1))
    return build_stage(folder, groups, {}, dtype=dtype, base_precision=quantised)


@pytest.mark.parametrize(
    ("kept", "settings"),
    [
        ("nf4", {**NF4, "bnb_4bit_use_double_quant": True}),
        ("nf4", {**NF4, "llm_int8_skip_modules": ["lm_head", "o_proj"]}),
        ("int8", {"load_in_8bit": True}),
    ],
    ids=["nf4 doubly", "nf4 partly", "int8"],
)
def test_a_folder_that_is_quantised_computes_what_it_does_in_transformers(
    kept: str, settings: dict, tmp_path: Path
) -> None:
    base = save_family("llama", tmp_path / "base", intermediate_size=192, num_hidden_layers=2)
    theirs = save_quantised(base, tmp_path / "quantised", **settings)
    folder = tmp_path / "quantised"
    shape = read_shape(folder)
    assert shape.quantised == kept and checkpoint_problems(folder, shape) == []
    tokens = torch.arange(3, 43).view(2, 20)
    with torch.no_grad():  # its products of quantised weights round activations to fewer bits
        expected = theirs.dequantize(torch.float32)(tokens).logits
    stage = stage_of(folder, Layout(1, 1))
    (batch,) = tensors_of(stage, [micro_batch(tokens, tokens, (0, 0))], [1.0])
    torch.testing.assert_close(stage.logits(batch), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=f"there in {kept} only"):
        shape.kept_in("bf16")


def test_what_a_quantised_folder_lacks_or_has_otherwise_is_told(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base", intermediate_size=128, num_hidden_layers=1)
    folder = tmp_path / "quantised"
    save_quantised(base, folder, **NF4)
    shape, file = read_shape(folder), folder / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.mlp.up_proj.weight"
    before = fingerprint(folder, shape)
    state = tensors[f"{name}.quant_state.bitsandbytes__nf4"]
    said = bytes(state.tolist()).replace(b'"blocksize": 64', b'"blocksize": 32')
    other = torch.tensor(list(said))
    absmax = tensors[f"{name}.absmax"]
    for part, value, words in (
        ("quant_state.bitsandbytes__nf4", other.to(torch.uint8), "blocksize = 32: want 64"),
        ("quant_state.bitsandbytes__nf4", state[:-9], "not valid JSON"),
        ("absmax", absmax + 1, None),
    ):
        save_file({**tensors, f"{name}.{part}": value}, file, metadata={"format": "pt"})
        problems = checkpoint_problems(folder, shape)
        assert len(problems) == (0 if words is None else 1)
        assert words is None or (name in problems[0] and words in problems[0])
    assert fingerprint(folder, shape) != before, "its scales are others"
    for other_kind in (None, "int8"):
        problems = checkpoint_problems(folder, replace(shape, quantised=other_kind))
        assert any(f"{name!r} is stored as U8" in problem for problem in problems)


@pytest.mark.parametrize("quantised", [None, *QUANTISED])
@pytest.mark.parametrize(
    "layout",
    [Layout(1, 1), Layout(2, 1), Layout(1, 2), pytest.param(Layout(4, 1), marks=pytest.mark.long)],
    ids=str,
)
def test_estimates_are_of_what_a_rank_holds(
    quantised: str | None, layout: Layout, tmp_path: Path
) -> None:
    """Within a fiftieth, where blocks are not cut: norms are not counted."""
    sizes = dict(hidden_size=256, intermediate_size=768, num_key_value_heads=4, num_hidden_layers=2)
    base = save_family("llama", tmp_path, **sizes)
    shape = read_shape(base).kept_in(quantised)
    runtime, dequantised = load_tables().runtime(None), 2 * 256 * 768 / layout.tp
    held = max(
        stage_of(base, layout, rank, quantised, torch.bfloat16).base_bytes
        for rank in range(layout.num_gpus)
    )
    found = estimate_memory(shape, layout.tp, layout.pp, Adapters(()), "bf16", runtime)
    expected = found.fixed_bytes - (0.0 if quantised is None else dequantised)
    assert held == pytest.approx(expected, rel=0.02)
