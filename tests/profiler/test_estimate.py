"""The estimator goes in the directions that hardware must take it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.layout.shapes import NAMED_SHAPES, resolve_shape
from lobra.model import head as model_head
from lobra.model.joint_stack import JointStack
from lobra.profiler.accelerators import Runtime, load_tables
from lobra.profiler.calibration import calibrate
from lobra.profiler.cost_model import load_cost_model
from lobra.profiler.estimate import estimate as estimate_all
from lobra.profiler.estimate_memory import (
    LOGITS_AT_ONCE,
    Adapters,
    estimate_memory,
)
from lobra.profiler.estimate_time import Workload, layer_ms
from lobra.profiler.layer_memory import MOST_RANKS
from lobra.profiler.memory import layouts_within
from lobra.profiler.profiles import TimeProfile, load_memory_profile
from lobra.profiler.sidecar import read_meta
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.tasks.task_file import load_trainer_config

TABLES = load_tables()
OURS = TABLES.runtime("deepspeed")
ADAPTERS = Adapters(((16, TARGET_MODULES),) * 6)


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
    assert LOGITS_AT_ONCE == model_head.LOGITS_AT_ONCE
    assert JointStack.most_ranks == MOST_RANKS
    shape = NAMED_SHAPES["7B"]
    estimate = estimate_memory(shape, 1, 1, ADAPTERS, "bf16", OURS)
    assert estimate.logits_tokens == LOGITS_AT_ONCE / shape.vocab_size
    for tokens in (1024, 2048, 4096, 65536):  # fewer take less than the exchange
        budget = estimate.total_bytes(tokens)
        assert estimate.max_tokens(budget + 1, 256, 1 << 20) == tokens
        assert estimate.max_tokens(budget - 1, 256, 1 << 20) == tokens - 256


def test_leaner_policies_and_fewer_tasks_hold_more() -> None:
    shape = NAMED_SHAPES["7B"]
    budget = 0.9 * TABLES.accelerator("A100-40GB").memory_bytes

    def tokens(adapters: Adapters, memory: str, runtime: Runtime = OURS) -> int:
        estimate = estimate_memory(shape, 1, 1, adapters, "bf16", runtime, memory)
        return estimate.max_tokens(budget, 256, 1 << 20)

    keep, lean, full = (tokens(ADAPTERS, memory) for memory in MEMORY_POLICIES)
    assert keep > 1.5 * tokens(ADAPTERS, "keep", replace(OURS, keeps_elementwise=True))
    assert lean > 1.5 * keep
    assert full > 1.5 * lean
    assert tokens(Adapters(ADAPTERS.specs[:1]), "keep") > keep


def test_a_calibrated_roofline_returns_the_efficiencies_that_made_the_rows() -> None:
    work = Workload(NAMED_SHAPES["7B"], TABLES.accelerator("A100-40GB"), "bf16", 16)
    truth = replace(work.accelerator.efficiency, matmul=0.5, attention=0.3, start_ms=1.7)
    s, b = (axis.reshape(-1) for axis in np.meshgrid([128, 512, 2048, 8192], [1, 2, 4, 8]))
    profile = TimeProfile(np.ones_like(b), s, b, layer_ms(work, truth, 1, b, s))
    found = calibrate(work, work.accelerator.efficiency, profile)
    assert found.matmul == pytest.approx(0.5, rel=1e-6)
    assert found.attention == pytest.approx(0.3, rel=1e-6)
    assert found.start_ms == pytest.approx(1.7, rel=1e-6)
    with pytest.raises(ConfigError, match="4 rows of tp 2"):
        calibrate(work, truth, profile, tp=2)
    slower = replace(work, accelerator=TABLES.accelerator("RTX3090-24GB"))
    with pytest.raises(ConfigError, match="do not belong together"):
        calibrate(slower, work.accelerator.efficiency, profile)


def test_time_shrinks_with_tp_until_the_group_leaves_the_node() -> None:
    work = Workload(NAMED_SHAPES["70B"], TABLES.accelerator("A800-80GB"), "bf16", 16)
    efficiency = work.accelerator.efficiency
    times = [float(layer_ms(work, efficiency, tp, 1, 8192)) for tp in (1, 2, 4, 8, 16)]
    assert times[:4] == sorted(times[:4], reverse=True)
    one_node = replace(work, gpus_per_node=16)
    assert times[4] > float(layer_ms(one_node, efficiency, 16, 1, 8192))


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
        "efficiency.matmul: 1.5 is not a share of the peak, at most 1",
        "efficiency.link: 2 is not a share of the peak, at most 1",
        "accelerators: 4090: a name is text, not int; put it in quotes",
        "accelerators.4090.memory_gib: inf is not finite",
    ]
    with pytest.raises(ConfigError, match="known are A100-40GB"):
        TABLES.accelerator("B9000")


def test_an_accelerators_own_efficiency_goes_before_the_general_one(tmp_path: Path) -> None:
    general, own = (TABLES.accelerator(name).efficiency for name in ("A100-40GB", "H200"))
    assert not general.starts_ahead and own.starts_ahead
    assert own == replace(
        general,
        **{name: getattr(own, name) for name in ("matmul", "attention", "start_ms")},
        starts_ahead=True,
    )
    path = tmp_path / "mine.yaml"
    entry = "{memory_gib: 16, bf16_tflops: 10, fp32_tflops: 5, memory_gb_s: 100, link_gb_s: 8, "
    entry += "network_gb_s: 1, efficiency: "
    path.write_text(
        "accelerators:\n  Mine: " + entry + "{link: 0.9, start_ms: 1}}\n"
        "efficiency: {link: 0.1, memory: 0.7, matmul: 0.5}\n",
        encoding="utf-8",
    )
    tables = load_tables(path)
    assert tables.accelerator("Mine").efficiency == replace(
        general, link=0.9, start_ms=1, memory=0.7, matmul=0.5
    )
    # A person's general one goes before what an accelerator that comes with the project has.
    expected = replace(own, link=0.1, memory=0.7, matmul=0.5)
    assert tables.accelerator("H200").efficiency == expected
    path.write_text(
        "accelerators:\n  One: " + entry + "{link: 2, speed: 1, matmul: null}}\n"
        "  Two: " + entry + "{starts_ahead: 1}}\n  Three: " + entry + "0.5}\n"
        "efficiency: {memory: 2}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as error:
        load_tables(path)
    assert [problem.split(": ", 1)[1] for problem in error.value.problems] == [
        "efficiency.memory: 2 is not a share of the peak, at most 1",
        "accelerators.One.efficiency.speed: unknown; known are matmul, attention, memory, link, "
        "network, start_ms, collective_start_ms, starts_ahead",
        "accelerators.One.efficiency.matmul: None is not a positive number",
        "accelerators.One.efficiency.link: 2 is not a share of the peak, at most 1",
        "accelerators.Two.efficiency.starts_ahead: 1 is not true or false",
        "accelerators.Three.efficiency: a mapping of matmul, attention, memory, link, network, "
        "start_ms, collective_start_ms, starts_ahead is expected",
    ]


def test_what_is_computed_again_takes_time() -> None:
    """By full at most a forward pass, of two (base) to three (adapters), of attention's 3.5 one.

    It takes all of one but the last product, and lean the products of gate and up; keep takes only
    what is elementwise, which is next to nothing in long micro-batches.
    """
    for tp in (1, 4):
        work = Workload(NAMED_SHAPES["7B"], TABLES.accelerator("A100-40GB"), "bf16", 16)
        for s in (256, 4096, 32768):
            plain_ms, *again_ms = (
                float(layer_ms(one, work.accelerator.efficiency, tp, 1, s))
                for one in (
                    replace(work, keeps_elementwise=True),
                    *(replace(work, memory=memory) for memory in MEMORY_POLICIES),
                )
            )
            keep, lean, full = (time_ms / plain_ms for time_ms in again_ms)
            assert 1.0 < keep < lean < full < 1.5
            assert full > 1.25
            assert s < 32768 or keep < 1.05


def test_estimates_in_memory_are_what_the_command_writes(tmp_path: Path) -> None:
    tasks = load_trainer_config("exp_task4").tasks

    found = estimate_all(
        resolve_shape("7B"),
        TABLES.accelerator("H200-141GB"),
        TABLES,
        tasks,
        num_gpus=2,
        gpus_per_node=8,
        max_seq_length=512,
        memory_share=0.9,
    )
    times, memory = tmp_path / "times.csv", tmp_path / "memory.csv"
    for policy in ("keep", "lean"):
        more = ["--model", "7B", "--estimate", "--accelerator", "H200-141GB", "--memory", policy]
        more += ["--trainer-config", "exp_task4", "--max-seq-length", "512"]
        assert main(["profile", "time", *more, "--tp", "1,2", "--output", str(times)]) == 0
        assert main(["profile", "memory", *more, "--num-gpus", "2", "--output", str(memory)]) == 0
    used = read_meta(times)["settings"]["efficiency"]
    assert used == vars(TABLES.accelerator("H200-141GB").efficiency)
    written = load_memory_profile(memory)
    for layout in (Layout(1, 1), Layout(1, 2, memory="lean"), Layout(2, 1)):
        sizes = layout.tp, layout.pp, layout.memory
        assert found.memory.max_tokens(*sizes) == written.max_tokens(*sizes) > 0
        own, theirs = (
            model.micro_batch_time(layout, 512, 512 * 100).total_ms
            for model in (found.cost_model, load_cost_model("7B", times))
        )
        assert own == pytest.approx(theirs, rel=1e-4)


def test_a_quantised_base_leaves_room_and_takes_time() -> None:
    """7B in nf4 leaves 9.5 GB more of a card: 6.5e9 weights in 4.1 bits, one of them in 16."""
    accelerator, room, times = TABLES.accelerator("A100-40GB"), {}, {}
    for kept in (None, "int8", "nf4"):
        shape = NAMED_SHAPES["7B"].kept_in(kept)
        estimate = estimate_memory(shape, 1, 1, ADAPTERS, "bf16", OURS)
        room[kept] = 0.9 * accelerator.memory_bytes - estimate.fixed_bytes
        tokens = estimate.max_tokens(0.9 * accelerator.memory_bytes, 256, 1 << 20)
        assert tokens == 0 or estimate.total_bytes(tokens) <= 0.9 * accelerator.memory_bytes
        work = Workload(shape, accelerator, "bf16", 16)
        times[kept] = [float(layer_ms(work, accelerator.efficiency, 1, 1, s)) for s in (256, 16384)]
    assert room["nf4"] - room[None] > 9.4e9 and room["int8"] - room[None] > 6.3e9
    assert times[None][0] < times["nf4"][0] < times["int8"][0] < 2.5 * times[None][0]
    assert times["int8"][1] < 1.05 * times[None][1], "few tokens pay for it"
