"""A sharded, pipelined model computes what transformers and PEFT compute on one process."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lobra.layout.layout import Layout
from lobra.layout.shapes import read_shape
from lobra.layout.world import one_replica
from lobra.model.groups import ReplicaGroups
from lobra.model.launch import run_ranks
from lobra.model.rank_results import RankError
from lobra.model.stage import build_stage
from tests.model.support import (
    SPECS,
    micro_batch,
    random_adapter,
    random_batches,
    save_family,
    save_llama,
    tensors_of,
)

FUNCTION = "tests.model.support:gradients_on_rank"
NUM_BATCHES = 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory):
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def peft_gradients(llama: Path) -> tuple[dict, list[float]]:
    return gradients_by_peft(llama)


def gradients_by_peft(llama: Path) -> tuple[dict, list[float]]:
    """Gradients and per-task losses from PEFT on one process, one task at a time."""
    gradients, losses = {}, []
    for task, spec in enumerate(SPECS):
        model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        config = LoraConfig(
            r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.target_modules)
        )
        model = get_peft_model(model, config)
        named = dict(model.named_parameters())
        for name, value in random_adapter(read_shape(llama), task).items():
            named[name.replace(".weight", ".default.weight")].data.copy_(value)
        total = torch.zeros(())
        for tokens, labels, rows in random_batches(NUM_BATCHES):
            mine = [row for row, owner in enumerate(rows) if owner == task]
            if not mine:
                continue
            logits = model(input_ids=tokens[mine]).logits[:, :-1].flatten(0, 1)
            total = total + torch.nn.functional.cross_entropy(
                logits, labels[mine][:, 1:].flatten(), reduction="sum", ignore_index=-100
            )
        (total * (0.5, 0.25)[task]).backward()
        losses.append(total.item())
        gradients |= {
            f"{task}.{name.replace('.default.', '.')}": parameter.grad.numpy()
            for name, parameter in named.items()
            if parameter.grad is not None
        }
    return gradients, losses


LAYOUTS = [Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(2, 2), Layout(4, 1), Layout(1, 3)]


@pytest.mark.parametrize(
    ("layout", "packed"),
    [*((one, True) for one in LAYOUTS), *((one, False) for one in LAYOUTS[:4])],
)
def test_gradients_and_losses_equal_peft(
    llama, peft_gradients, layout: Layout, packed: bool
) -> None:
    check_gradients(llama, layout, packed, *peft_gradients)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_shorter_than_the_sequences(family: str, tmp_path: Path) -> None:
    """Mistral's window is on every layer; Qwen2's from the third on, so on one stage only."""
    # The rows have up to 24 tokens.
    window = dict(sliding_window=7)
    if family == "qwen2":
        window |= dict(use_sliding_window=True, max_window_layers=2)
    base = save_family(family, tmp_path / "base", **window)
    expected = gradients_by_peft(base)
    for packed in (True, False):
        check_gradients(base, Layout(1, 2), packed, *expected)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "sliding_window": 500}))
    assert gradients_by_peft(base)[1] != pytest.approx(expected[1], rel=1e-4), "no window at all"


ROPE = {
    "llama3": dict(low_freq_factor=1.0, high_freq_factor=4.0, factor=8.0),
    "yarn": dict(factor=4.0),
    "longrope": dict(short_factor=[1.2] * 8, long_factor=[3.0] * 8, factor=32.0),
}


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotary_embeddings_by_each_sequence_s_own_length(kind: str, tmp_path: Path) -> None:
    """Sequences of 12 to 24 tokens lie together; from 17 on they are long."""
    rope = dict(rope_type=kind, rope_theta=10000.0, original_max_position_embeddings=16)
    base = save_llama(tmp_path / "base", rope_parameters={**rope, **ROPE[kind]})
    expected = gradients_by_peft(base)
    for layout, packed in ((Layout(1, 2), True), (Layout(1, 1), False)):
        check_gradients(base, layout, packed, *expected)
    plain = save_llama(tmp_path / "plain")
    assert gradients_by_peft(plain)[1] != pytest.approx(expected[1], rel=1e-4)


def check_gradients(
    base: Path, layout: Layout, packed: bool, expected: dict, losses: list[float]
) -> None:
    """Check the gradients and losses of one replica against PEFT's."""
    world = one_replica(layout)
    arguments = dict(folder=base, world=world, num=NUM_BATCHES, packed=packed)
    ranks = run_ranks(FUNCTION, world.num_ranks, arguments)
    summed: dict[str, np.ndarray] = {}
    for result in ranks:
        for name, gradient in result["gradients"].items():
            summed[name] = summed.get(name, 0) + gradient
        if result["place"].is_last_stage:
            np.testing.assert_allclose(result["losses"], losses, rtol=1e-5)
    assert summed.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.linalg.norm(summed[name] - gradient) / np.linalg.norm(gradient)
        assert error < 1e-4, f"{name}: relative error {error:.1e}"


def test_a_vocabulary_that_the_ranks_cannot_share_evenly(tmp_path: Path) -> None:
    """257 tokens are 129 and 128: at most 5 * 129 - 1 logits would be 4 tokens here and 5 there."""
    base = save_llama(tmp_path / "base", vocab_size=257, num_hidden_layers=1)
    one, *both = [
        result
        for layout in (Layout(1, 1), Layout(2, 1))
        for result in run_ranks(
            "tests.model.support:gradients_few_logits_at_once",
            layout.num_gpus,
            dict(folder=base, world=one_replica(layout), num=2, logits=5 * 129 - 1),
            timeout_s=60,
        )
    ]
    assert [set(result["chunks"]) for result in both] == [{4}, {4}]
    for result in both:
        np.testing.assert_allclose(result["losses"], one["losses"], rtol=1e-5)
    for name, gradient in one["gradients"].items():
        summed = sum(result["gradients"][name] for result in both)
        error = np.linalg.norm(summed - gradient) / np.linalg.norm(gradient)
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        *((layout, ("lora", "lora")) for layout in (Layout(1, 1), Layout(1, 2), Layout(2, 2))),
        *((layout, ("dora", "vera")) for layout in (Layout(1, 1), Layout(2, 1))),
    ],
)
def test_every_memory_policy_computes_what_plain_autograd_does(
    layout: Layout, kinds: tuple[str, str], tmp_path: Path
) -> None:
    """To the bit, dropout included; what is computed again adds no gradient again."""
    base = save_llama(tmp_path / "base", num_hidden_layers=2 * layout.pp)
    function = "tests.model.support:unlike_plain_autograd"
    arguments = dict(folder=base, world=one_replica(layout), kinds=kinds)
    assert run_ranks(function, layout.num_gpus, arguments) == [[]] * layout.num_gpus


@pytest.mark.parametrize("family", ["olmo2", pytest.param("gemma2", marks=pytest.mark.long)])
def test_every_memory_policy_with_norms_behind_and_shared(family: str, tmp_path: Path) -> None:
    base = save_family(family, tmp_path / "base", num_hidden_layers=2)
    arguments = dict(folder=base, world=one_replica(Layout(2, 1)), kinds=("lora", "lora"))
    assert run_ranks("tests.model.support:unlike_plain_autograd", 2, arguments) == [[], []]


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("memory", "passes"), [("keep", 1), ("lean", 2), ("full", 2)])
def test_a_stage_follows_the_policy_of_its_layout_and_says_nothing(
    llama, memory: str, passes: int, stage: int, caplog: pytest.LogCaptureFixture
) -> None:
    place = one_replica(Layout(1, 2, memory=memory)).place(stage)
    groups = ReplicaGroups(place, None, (stage,), None, (0, 1))
    tokens = torch.arange(3, 11).unsqueeze(0)
    computed: list[int] = []
    transformers.utils.logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            built = build_stage(llama, groups, dict(enumerate(SPECS)))
            built.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_args: computed.append(1))
            (batch,) = tensors_of(built, [micro_batch(tokens, tokens, (0,))], [1.0, 1.0])
            built.hidden(batch, torch.randn(1, 8, 64) if stage else None).sum().backward()
    finally:
        transformers.utils.logging.disable_propagation()
    assert not caplog.records
    assert len(computed) == passes, "on a CPU keep is plain autograd"


@pytest.mark.parametrize("layout", [Layout(2, 2), Layout(4, 1)])
def test_a_rank_reads_and_holds_only_its_own_weights(llama, layout: Layout) -> None:
    world = one_replica(layout)
    whole = run_ranks(FUNCTION, 1, dict(folder=llama, world=one_replica(Layout(1, 1)), num=1))[0]
    ranks = run_ranks(FUNCTION, world.num_ranks, dict(folder=llama, world=world, num=1))
    for result in ranks:
        assert result["loaded_bytes"] == result["held_bytes"]
        # Only norms (64 floats each) and, with tp over the kv heads, shared heads are held twice.
        share = whole["held_bytes"] / len(ranks)
        assert result["held_bytes"] < share + 9 * 64 * 4 + 4 * 2 * 16 * 64 * 4


def test_dropout_is_the_same_on_every_layout_packed_and_padded(llama) -> None:
    summed = []
    for tp, pp, dropout, packed in (
        (1, 1, 0.5, True), (1, 1, 0.5, False), (2, 1, 0.5, True), (1, 2, 0.5, False),
        (1, 1, 0.0, True),
    ):  # fmt: skip
        layout = Layout(tp, pp)
        arguments = dict(
            folder=llama, world=one_replica(layout), num=3, dropout=dropout, packed=packed
        )
        total: dict[str, np.ndarray] = {}
        for result in run_ranks(FUNCTION, layout.num_gpus, arguments):
            for name, gradient in result["gradients"].items():
                total[name] = total.get(name, 0) + gradient
        summed.append(total)
    reference, *others, without = summed
    for other in others:
        for name, gradient in reference.items():
            error = np.linalg.norm(other[name] - gradient) / np.linalg.norm(gradient)
            assert error < 1e-5, f"{name}: relative error {error:.1e}"
    assert any(np.abs(reference[name] - without[name]).max() > 1e-2 for name in reference)


def test_a_rank_that_is_killed_ends_the_others_at_once() -> None:
    run_ranks("os:getpid", 1)  # the fork server is there: its imports are no part of what follows
    begin = time.monotonic()
    with pytest.raises(RankError, match="rank 1 failed: the process was killed by SIGKILL.*memory"):
        run_ranks("tests.model.support:die_on_rank_one", 3)
    assert time.monotonic() - begin < 30


def test_a_failing_rank_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 failed(.|\n)*negative dimension"):
        run_ranks("tests.model.support:fail_on_rank_one", 2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_peaks_near_the_rank_s_own_share(tmp_path: Path) -> None:
    save_llama(tmp_path / "small", num_hidden_layers=2)
    big = save_llama(
        tmp_path / "big", hidden_size=512, intermediate_size=1536, vocab_size=8192,
        num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    whole = sum(path.stat().st_size for path in big.glob("*.safetensors"))
    for own, peak in run_ranks(
        "tests.model.support:loading_peak_bytes",
        4,
        dict(folder=big, world=one_replica(Layout(2, 2))),
    ):
        assert own < 0.26 * whole
        # One tensor at a time is in flight, and the file's pages are mapped while it is read.
        assert peak < 2.2 * own + 20 * 2**20, f"{peak / 2**20:.0f} MiB for {own / 2**20:.0f}"
