"""The estimator: against tensors really saved, and in the directions hardware must take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.shapes import NAMED_SHAPES, read_shape
from lobra.layout.world import one_replica
from lobra.model import tensor_parallel
from lobra.model.adapter import AdapterSpec
from lobra.model.groups import build_groups
from lobra.model.launch import run_ranks
from lobra.model.precision import DTYPES
from lobra.model.stage import build_stage
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_memory import (
    LOGITS_AT_ONCE,
    Adapters,
    estimate_memory,
    saved_bytes_per_token,
)
from lobra.profiler.estimate_time import Workload, calibrate, layer_ms
from lobra.profiler.memory import layouts_within
from lobra.profiler.memory_rank import synthetic_batch
from lobra.profiler.profiles import TimeProfile
from lobra.tasks.target_modules import TARGET_MODULES
from tests.model.support import save_llama

TABLES = load_tables()
OURS = TABLES.runtime("deepspeed")
ADAPTERS = Adapters(((16, TARGET_MODULES),) * 6)


def saved_on_rank(folder: Path, precision: str, rank: int, dropout: float) -> int:
    """Bytes that autograd keeps of the decoder layers for a micro-batch of 4 x 64 tokens."""
    groups = build_groups(one_replica(Layout(dist.get_world_size(), 1)))
    specs = {0: AdapterSpec("one", rank, rank, TARGET_MODULES, dropout)}
    stage = build_stage(folder, groups, specs, dtype=DTYPES[precision])
    batch = synthetic_batch((4, 64), stage)
    weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = stage.hidden(batch, None)
    # Of tokens, not of adapters: those do not grow with the micro-batch.
    grown = [t for at, t in kept.items() if at not in weights and t.untyped_storage().nbytes() > 1]
    assert hidden.requires_grad
    return sum(t.untyped_storage().nbytes() for t in grown)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("precision", "tp", "dropout"),
    [
        ("fp32", 1, 0.0),
        ("bf16", 1, 0.0),
        ("fp32", 2, 0.0),
        ("fp32", 1, 0.1),
        ("bf16", 1, 0.1),
        ("fp32", 2, 0.1),
    ],
)
def test_what_autograd_keeps_is_what_the_shapes_say(
    tmp_path: Path, precision: str, tp: int, dropout: float
) -> None:
    folder = save_llama(tmp_path / "llama", hidden_size=128, intermediate_size=320)
    shape = read_shape(folder)
    arguments = {"folder": folder, "precision": precision, "rank": 2, "dropout": dropout}
    measured = run_ranks("tests.profiler.test_estimate:saved_on_rank", tp, arguments)[0]
    per_token = saved_bytes_per_token(shape, tp, precision, 2)
    estimated = per_token * shape.num_layers * 4 * 64
    assert estimated == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("model", ["7B", "13B", "32B", "70B"])
@pytest.mark.parametrize("runtime", ["deepspeed", "hetu"])
def test_more_memory_holds_more_and_more_shards_hold_more(model: str, runtime: str) -> None:
    shape = NAMED_SHAPES[model]
    found = {}
    for name in ("A100-40GB", "A800-80GB", "H200-141GB"):
        budget = 0.9 * TABLES.accelerator(name).memory_bytes
        for tp, pp in layouts_within(shape, 16):
            estimate = estimate_memory(shape, tp, pp, ADAPTERS, "bf16", TABLES.runtime(runtime))
            found[name, tp, pp] = estimate.max_tokens(budget, 256, 1 << 20)
    for tp, pp in layouts_within(shape, 16):
        sizes = [found[name, tp, pp] for name in ("A100-40GB", "A800-80GB", "H200-141GB")]
        assert sizes == sorted(sizes)
        assert sizes[-1] > 0 or tp * pp < 4
        if ("H200-141GB", 2 * tp, pp) in found:
            assert found["H200-141GB", 2 * tp, pp] >= found["H200-141GB", tp, pp]


def test_the_loss_holds_no_more_logits_than_it_says() -> None:
    assert LOGITS_AT_ONCE == tensor_parallel.LOGITS_AT_ONCE
    shape = NAMED_SHAPES["7B"]
    estimate = estimate_memory(shape, 1, 1, ADAPTERS, "bf16", OURS)
    assert estimate.logits_tokens == LOGITS_AT_ONCE / shape.vocab_size
    for tokens in (256, 1024, 4096, 65536):
        budget = estimate.total_bytes(tokens)
        assert estimate.max_tokens(budget + 1, 256, 1 << 20) == tokens
        assert estimate.max_tokens(budget - 1, 256, 1 << 20) == tokens - 256


def test_checkpointing_and_fewer_tasks_hold_more() -> None:
    shape = NAMED_SHAPES["7B"]
    budget = 0.9 * TABLES.accelerator("A100-40GB").memory_bytes

    def tokens(adapters: Adapters, memory: str) -> int:
        estimate = estimate_memory(shape, 1, 1, adapters, "bf16", OURS, memory)
        return estimate.max_tokens(budget, 256, 1 << 20)

    assert tokens(ADAPTERS, "full") > 3 * tokens(ADAPTERS, "keep")
    assert tokens(Adapters(ADAPTERS.specs[:1]), "keep") > tokens(ADAPTERS, "keep")


def test_a_calibrated_roofline_returns_the_efficiencies_that_made_the_rows() -> None:
    work = Workload(NAMED_SHAPES["7B"], TABLES.accelerator("A100-40GB"), "bf16", 16)
    truth = replace(TABLES.efficiency, matmul=0.5, attention=0.3, start_ms=1.7)
    s, b = (axis.reshape(-1) for axis in np.meshgrid([128, 512, 2048, 8192], [1, 2, 4, 8]))
    profile = TimeProfile(np.ones_like(b), s, b, layer_ms(work, truth, 1, b, s))
    found = calibrate(work, TABLES.efficiency, profile)
    assert found.matmul == pytest.approx(0.5, rel=1e-6)
    assert found.attention == pytest.approx(0.3, rel=1e-6)
    assert found.start_ms == pytest.approx(1.7, rel=1e-6)
    with pytest.raises(ConfigError, match="4 rows of tp 2"):
        calibrate(work, truth, profile, tp=2)
    slower = replace(work, accelerator=TABLES.accelerator("RTX3090-24GB"))
    with pytest.raises(ConfigError, match="do not belong together"):
        calibrate(slower, TABLES.efficiency, profile)


def test_time_shrinks_with_tp_until_the_group_leaves_the_node() -> None:
    work = Workload(NAMED_SHAPES["70B"], TABLES.accelerator("A800-80GB"), "bf16", 16)
    times = [float(layer_ms(work, TABLES.efficiency, tp, 1, 8192)) for tp in (1, 2, 4, 8, 16)]
    assert times[:4] == sorted(times[:4], reverse=True)
    one_node = replace(work, gpus_per_node=16)
    assert times[4] > float(layer_ms(one_node, TABLES.efficiency, 16, 1, 8192))


def test_a_users_accelerator_is_added_and_mistakes_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    entry = "{memory_gib: 16, bf16_tflops: 10, fp32_tflops: 5, memory_gb_s: 100, link_gb_s: 8, "
    path.write_text("accelerators:\n  Mine: " + entry + "network_gb_s: 1}\n", encoding="utf-8")
    assert load_tables(path).accelerator("mine").memory_bytes == 16 << 30
    assert load_tables(path).accelerator("h200-141gb").bf16_tflops == 989
    path.write_text("accelerators:\n  Mine: " + entry + "speed: 1}\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_tables(path)
    assert len(error.value.problems) == 2
    path.write_text(
        "accelerators:\n  4090: " + entry.replace("gib: 16", "gib: .inf") + "network_gb_s: 1}\n"
        "efficiency: {matmul: 1.5, link: 2, start_ms: 5}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as error:
        load_tables(path)
    assert [problem.split(": ", 1)[1] for problem in error.value.problems] == [
        "accelerators: 4090: a name is text, not int; put it in quotes",
        "accelerators.4090.memory_gib: inf is not finite",
        "efficiency.matmul: 1.5 is not a share of the peak, at most 1",
        "efficiency.link: 2 is not a share of the peak, at most 1",
    ]
    with pytest.raises(ConfigError, match="known are A100-40GB"):
        TABLES.accelerator("B9000")


def test_computing_layers_again_costs_a_forward_pass() -> None:
    """Of 2 (base) to 3 (adapters) passes one more, of attention's 3.5 one more."""
    for tp in (1, 4):
        work = Workload(NAMED_SHAPES["7B"], TABLES.accelerator("A100-40GB"), "bf16", 16)
        again = replace(work, memory="full")
        for s in (256, 4096, 32768):
            kept_ms, again_ms = (layer_ms(w, TABLES.efficiency, tp, 1, s) for w in (work, again))
            assert 4.5 / 3.5 < again_ms / kept_ms < 1.5
