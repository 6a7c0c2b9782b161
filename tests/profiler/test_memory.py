"""The memory sweep over a stand-in for the ranks, and once over real ones."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.layout.layout import MEMORY_POLICIES, Layout
from lobra.layout.shapes import NAMED_SHAPES, read_shape
from lobra.model.heartbeat import PHASES, Beat
from lobra.model.rank_results import RankError, _cause_of_death
from lobra.profiler.accelerators import load_tables
from lobra.profiler.capacity import parts_of
from lobra.profiler.estimate_memory import Adapters, estimate_memory
from lobra.profiler.memory import (
    LayoutResult,
    MemorySweep,
    layouts_within,
    measure_trial,
    parse_bytes,
    sweep_memory,
    trial_shapes,
    whole_steps,
)
from lobra.profiler.memory_rank import RankMemory
from lobra.profiler.profiles import MEMORY_COLUMNS, load_memory_profile
from lobra.profiler.sidecar import read_meta, write_meta
from lobra.profiler.sweep_file import open_sweep
from lobra.profiler.sweep_rows import SweepFile
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from tests.model.support import save_llama

TINY = NAMED_SHAPES["tiny"]
OURS = load_tables().runtime("deepspeed")
LAYOUTS = ((1, 1), (1, 2), (2, 1))
TASKS = tuple(
    TaskConfig(f"task{rank}", rank, 2.0 * rank, TARGET_MODULES, 4, "none", 512) for rank in (4, 8)
)
SWEEP = MemorySweep(Path("unused"), TINY, TASKS, LAYOUTS, 4096, 1_000_000, "fp32", "cpu")


def opened(path: Path, sweep: MemorySweep = SWEEP) -> SweepFile:
    return open_sweep(path, MEMORY_COLUMNS, 3, sweep.settings(), kind="measured")


def linear_memory(sweep: MemorySweep, tp: int, pp: int, tokens: int) -> list[RankMemory]:
    """Half the activations per rank with tp 2, and the weights split by both."""
    rank = RankMemory(100_000 // (tp * pp), 1000, 1000, 400 * tokens // tp)
    return [rank] * (tp * pp)


def test_capacities_of_a_linear_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    results = sweep_memory(SWEEP, opened(path), measure=linear_memory)
    capacity = {(r.tp, r.pp): r.max_tokens for r in results}
    # budget 1,000,000: <1,1> (1e6 - 102,000) / 400 = 2245; <2,1> twice (1e6 - 52,000) / 400 = 4740
    assert capacity == {(1, 1): 2048, (1, 2): 2304, (2, 1): 4096}
    assert load_memory_profile(path).max_tokens(1, 2) == 2304


def test_a_sweep_that_is_continued_measures_no_layout_twice(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    tried: list[tuple[int, int]] = []

    def killed_at_the_second(sweep, tp, pp, tokens):
        tried.append((tp, pp))
        if (tp, pp) == (1, 2):
            raise KeyboardInterrupt
        return linear_memory(sweep, tp, pp, tokens)

    with pytest.raises(KeyboardInterrupt):
        sweep_memory(SWEEP, opened(path), measure=killed_at_the_second)
    results = sweep_memory(SWEEP, opened(path), measure=linear_memory)
    assert [(r.tp, r.pp) for r in results] == [(1, 2), (2, 1)]
    assert len(load_memory_profile(path).rows) == 3
    assert sweep_memory(SWEEP, opened(path), measure=linear_memory) == ()


def test_no_trial_is_made_twice_though_killed_at_any(tmp_path: Path) -> None:
    whole: list[tuple[int, ...]] = []

    def noted(sweep, tp, pp, tokens):
        whole.append((tp, pp, tokens))
        return linear_memory(sweep, tp, pp, tokens)

    expected = sweep_memory(SWEEP, opened(tmp_path / "whole.csv"), measure=noted)
    path = tmp_path / "m.csv"
    tried: list[tuple[int, ...]] = []

    def killed_after(trials: int):
        def measure(sweep, tp, pp, tokens):
            if len(tried) == trials:
                raise KeyboardInterrupt
            tried.append((tp, pp, tokens))
            return linear_memory(sweep, tp, pp, tokens)

        return measure

    for trials in range(1, len(whole)):
        with pytest.raises(KeyboardInterrupt):
            sweep_memory(SWEEP, opened(path), measure=killed_after(trials))
    last = sweep_memory(SWEEP, opened(path), measure=killed_after(len(whole)))
    assert tried == whole
    assert last[-1] == expected[-1], "with the trials of the runs before"
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert read_meta(path)["rows"] == read_meta(tmp_path / "whole.csv")["rows"]
    assert read_meta(path)["trials"] == {}, "trials of complete layouts are in their rows"


def linear_by_policy(sweep: MemorySweep, tp: int, pp: int, tokens: int) -> list[RankMemory]:
    """A fifth of the activations with layers computed again."""
    ranks = linear_memory(sweep, tp, pp, tokens)
    less = [replace(rank, activation_bytes=rank.activation_bytes // 5) for rank in ranks]
    return less if sweep.memory == "full" else ranks


def test_both_policies_in_one_file_though_killed_at_any_trial(tmp_path: Path) -> None:
    full = replace(SWEEP, memory="full", max_seq_length=16384)
    keep = replace(SWEEP, max_seq_length=16384)
    path = tmp_path / "m.csv"
    tried: list[tuple[object, ...]] = []

    def run(trials: int) -> None:
        def measure(sweep, tp, pp, tokens):
            if len(tried) == trials:
                raise KeyboardInterrupt
            tried.append((sweep.memory, tp, pp, tokens))
            return linear_by_policy(sweep, tp, pp, tokens)

        for sweep in (keep, full):
            file = open_sweep(
                path, MEMORY_COLUMNS, 3, sweep.settings(), kind="measured", memory=sweep.memory
            )
            sweep_memory(sweep, file, measure=measure)

    for trials in range(1, 100):
        try:
            run(trials)
            break
        except KeyboardInterrupt:
            pass
    assert len(tried) == len(set(tried)) == trials, "no trial is made twice"
    profile = load_memory_profile(path)
    assert [profile.max_tokens(1, 1, memory) for memory in ("keep", "full")] == [2048, 11008]
    assert len(profile.rows) == 6
    assert Layout(2, 1, memory="full") in profile.layouts
    assert read_meta(path)["trials"] == {}
    assert {"1,1,1", "1,1,1,full"} <= set(read_meta(path)["rows"])


def test_a_file_of_before_the_column_says_it_in_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text("tp,pp,sp,max_tokens\n1,1,1,4096\n")
    assert load_memory_profile(path).layouts == (Layout(1, 1),)
    write_meta(path, {"settings": {"gradient_checkpointing": True}})
    assert load_memory_profile(path).layouts == (Layout(1, 1, memory="full"),)
    path.write_text("tp,pp,sp,max_tokens,memory\n1,1,1,4096,\n1,1,1,2048,most\n")
    with pytest.raises(ConfigError) as error:
        load_memory_profile(path)
    assert [problem.partition("line ")[2] for problem in error.value.problems] == [
        "3: memory: 'most' is not one of keep, lean, full",
        "3: <1,1> sp 1 is already on line 2; keep one",
    ]


def test_a_trial_tells_the_parts_of_a_layout(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    sweep_memory(SWEEP, opened(path), measure=linear_memory)
    profile = load_memory_profile(path)
    parts = parts_of(profile.meta, profile.rows[-1])
    assert (profile.rows[-1].tp, profile.rows[-1].pp) == (2, 1)
    assert parts is not None
    assert (parts.weight_bytes, parts.elements) == (50_000, 125)
    assert (parts.bytes_per_element, parts.exchange_bytes_per_element) == (
        8 + 6,
        pytest.approx(8.1, abs=0.1),
    )
    assert parts.activation_bytes == 200 * parts.tokens
    assert parts.bytes_per_token == pytest.approx(200)


def test_trials_out_of_memory_are_kept_failures_are_not(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    sweep = replace(SWEEP, layouts=((1, 1),))

    def first(sweep, tp, pp, tokens):
        raise RankError(0, "out of memory" if tokens == 4096 else "ZeroDivisionError: a bug")

    assert sweep_memory(sweep, opened(path), measure=first)[0].max_tokens is None
    assert read_meta(path)["trials"] == {"1,1": [[4096, None, "ran out of memory"]]}

    def second(sweep, tp, pp, tokens):
        assert tokens != 4096
        return linear_memory(sweep, tp, pp, tokens)

    assert sweep_memory(sweep, opened(path), measure=second)[0].max_tokens == 2048


def test_a_row_that_was_removed_is_measured_anew(tmp_path: Path) -> None:
    """Also where a kill came just before its trials were dropped."""
    path = tmp_path / "m.csv"
    sweep_memory(SWEEP, opened(path), measure=linear_memory)
    write_meta(path, read_meta(path) | {"trials": {"1,1": [[4096, 1, ""]]}})
    assert sweep_memory(SWEEP, opened(path), measure=linear_memory) == ()
    path.write_text(path.read_text().replace("1,1,1,2048\n", ""))
    again = sweep_memory(SWEEP, opened(path), measure=linear_memory)
    assert [(r.tp, r.pp, r.max_tokens) for r in again] == [(1, 1, 2048)]


@pytest.mark.parametrize(
    "death",
    [
        _cause_of_death(-signal.SIGKILL, Beat(0, 0, PHASES[0])),
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
    ],
)
def test_out_of_memory_is_an_answer(tmp_path: Path, death: str) -> None:
    def measure(sweep, tp, pp, tokens):
        if tokens > 1024:
            raise RankError(0, death)
        return linear_memory(sweep, tp, pp, tokens)

    results = sweep_memory(SWEEP, opened(tmp_path / "m.csv"), measure=measure)
    assert {r.max_tokens for r in results} == {1024}


def test_another_failure_ends_the_layout_but_not_the_sweep(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"

    def measure(sweep, tp, pp, tokens):
        if (tp, pp) == (1, 2):
            raise RankError(1, "ZeroDivisionError: a bug")
        return linear_memory(sweep, tp, pp, tokens)

    reported: list[LayoutResult] = []
    sweep_memory(SWEEP, opened(path), reported.append, measure)
    failed = [r for r in reported if r.max_tokens is None]
    assert [(r.tp, r.pp) for r in failed] == [(1, 2)]
    assert "ZeroDivisionError" in failed[0].failure
    assert [(r.tp, r.pp) for r in load_memory_profile(path).rows] == [(1, 1), (2, 1)]


def test_nothing_fits_is_a_row_of_zero(tmp_path: Path) -> None:
    sweep = replace(SWEEP, budget_bytes=1)
    results = sweep_memory(sweep, opened(tmp_path / "m.csv", sweep), measure=linear_memory)
    assert {r.max_tokens for r in results} == {0}


def test_layouts() -> None:
    assert layouts_within(TINY, 4) == ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))
    assert (1, 3) in layouts_within(NAMED_SHAPES["7B"], 4), "11, 11, 10 layers: nearly divided"
    for tp, pp in layouts_within(NAMED_SHAPES["70B"], 64):
        assert 64 % tp == 0
        assert tp * pp <= 64


def test_both_shapes_of_a_trial_hold_its_tokens() -> None:
    for tokens in range(256, 4096, 256):
        assert {b * s for b, s in trial_shapes(tokens)} == {tokens}


def profile_memory(path: Path, folder: Path, num_gpus: int, *more: str) -> int:
    arguments = ["--model", str(folder), "--num-gpus", str(num_gpus), "--output", str(path)]
    arguments += ["--trainer-config", "quickstart", "--device", "cpu", *more]
    return main(["profile", "memory", *arguments])


def test_all_rows_of_a_file_have_one_default_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half the memory a rank for two ranks, but not in a file begun with one."""
    budgets: dict[tuple[int, int], int] = {}

    def measure(sweep, tp, pp, tokens):
        budgets[tp, pp] = sweep.budget_bytes
        return linear_memory(sweep, tp, pp, tokens)

    monkeypatch.setattr("lobra.profiler.memory.measure_trial", measure)
    monkeypatch.setattr("lobra.profiler.hardware.available_memory_bytes", lambda: 1000 << 20)
    folder, path = save_llama(tmp_path / "llama"), tmp_path / "m.csv"
    assert profile_memory(path, folder, 1) == 0
    assert "as when this file was begun" not in capsys.readouterr().err
    assert profile_memory(path, folder, 2, "--restart", "changed") == 0
    assert "budget of a rank: 1000 MiB, as when this file was begun" in capsys.readouterr().err
    assert set(budgets) == {(1, 1), (1, 2), (2, 1)}
    assert set(budgets.values()) == {1000 << 20}
    assert profile_memory(path, folder, 2, "--restart", "always") == 0
    assert set(budgets.values()) == {500 << 20}


def test_a_layout_may_hold_a_longest_sequence_of_any_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [whole_steps(tokens) for tokens in (1, 256, 257, 1000)] == [256, 256, 512, 1024]
    monkeypatch.setattr("lobra.profiler.memory.measure_trial", linear_memory)
    folder, path = save_llama(tmp_path / "llama"), tmp_path / "m.csv"
    assert profile_memory(path, folder, 1, "--max-seq-length", "1000") == 0
    assert load_memory_profile(path).max_tokens(1, 1) == 1024
    estimate = ["--estimate", "--accelerator", "A800-80GB", "--max-seq-length", "1000"]
    assert profile_memory(tmp_path / "e.csv", folder, 1, *estimate) == 0
    assert load_memory_profile(tmp_path / "e.csv").max_tokens(1, 1) == 1024


@pytest.mark.parametrize(
    ("text", "size"), [("84MB", 84 << 20), ("1.5GiB", 3 << 29), ("2g", 2 << 30), ("512", 512)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "84 bananas", "GB"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="600MB"):
        parse_bytes(text)


@pytest.mark.ranks
def test_real_ranks_take_what_they_must_and_more_with_more_tokens(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", max_position_embeddings=2048)
    sweep = replace(SWEEP, folder=folder, shape=read_shape(folder), budget_bytes=1 << 30)
    small, large = (measure_trial(sweep, 1, 2, tokens) for tokens in (512, 2048))
    assert len(small) == len(large) == 2
    for one, two in zip(small, large, strict=True):
        assert one.weight_bytes == two.weight_bytes
        assert one.adapter_bytes == two.adapter_bytes
        # The residual stream alone: hidden 64, 4 bytes, kept at least twice a layer, 2 layers.
        assert one.activation_bytes > 512 * 64 * 4 * 2 * 2
        assert 2.5 < two.activation_bytes / one.activation_bytes < 6
    elements = sum(sweep.shape.adapter_elements(t.rank, t.target_modules) for t in sweep.tasks)
    assert sum(rank.adapter_bytes for rank in small) == 8 * elements
    assert sum(rank.optimizer_bytes for rank in small) == 12 * elements


def test_a_rank_takes_activations_or_the_exchange() -> None:
    """Never both at once: the exchange comes after the last backward pass."""
    assert RankMemory(100, 10, 5, 40, 30).total_bytes == 155
    assert RankMemory(100, 10, 5, 40, 60).total_bytes == 175


@pytest.mark.long
@pytest.mark.ranks
def test_a_trial_drops_out_as_its_tasks_do(tmp_path: Path) -> None:
    """Factors are not kept, and those of a linear take less than a layer's gradients."""
    folder = save_llama(
        tmp_path / "llama", hidden_size=128, num_hidden_layers=8, max_position_embeddings=2048
    )
    plain = replace(SWEEP, folder=folder, shape=read_shape(folder), budget_bytes=1 << 30)
    dropping = replace(plain, tasks=(replace(TASKS[0], lora_dropout=0.1), TASKS[1]))
    (without,), (with_dropout,) = (measure_trial(sweep, 1, 1, 2048) for sweep in (plain, dropping))
    here = replace(OURS, keeps_elementwise=True)  # as on a CPU
    estimates = [
        estimate_memory(
            plain.shape, 1, 1, Adapters.of_tasks(sweep.tasks, plain.shape), "fp32", here
        )
        for sweep in (plain, dropping)
    ]
    assert estimates[0].bytes_per_token == estimates[1].bytes_per_token
    added = with_dropout.activation_bytes - without.activation_bytes
    assert abs(added) < 0.02 * without.activation_bytes
    assert with_dropout.exchange_bytes == without.exchange_bytes == with_dropout.adapter_bytes
    assert plain.settings() != dropping.settings(), "never mixed with rows of the other kind"


@pytest.mark.long
@pytest.mark.ranks
def test_leaner_policies_on_real_ranks_take_less(tmp_path: Path) -> None:
    """Under full little but one layer's activations is left, the more layers the less."""
    folder = save_llama(tmp_path / "llama", num_hidden_layers=8, max_position_embeddings=2048)
    plain = replace(SWEEP, folder=folder, shape=read_shape(folder), budget_bytes=1 << 30)
    keep, lean, full = (
        measure_trial(replace(plain, memory=memory), 1, 1, 2048)[0] for memory in MEMORY_POLICIES
    )
    assert keep.weight_bytes == lean.weight_bytes == full.weight_bytes
    assert lean.activation_bytes < 0.7 * keep.activation_bytes
    assert full.activation_bytes < 0.8 * lean.activation_bytes


@pytest.mark.ranks
def test_a_rank_far_over_its_budget_fails_to_allocate(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama", intermediate_size=16_384, num_hidden_layers=1)
    # 16,384 activations of 8,192 tokens are 512 MiB, several times.
    sweep = replace(
        SWEEP, folder=folder, shape=read_shape(folder), budget_bytes=1 << 20, max_seq_length=8192
    )
    with pytest.raises(RankError, match="can't allocate memory"):
        measure_trial(sweep, 1, 1, 8192)


@pytest.mark.ranks
def test_a_quantised_base_on_real_ranks_takes_what_is_estimated(tmp_path: Path) -> None:
    """Weights within a twentieth; while one is multiplied by, its values are there in fp32."""
    sizes = dict(hidden_size=256, intermediate_size=768, max_position_embeddings=2048)
    folder = save_llama(tmp_path / "llama", **sizes)
    plain = replace(SWEEP, folder=folder, shape=read_shape(folder), budget_bytes=1 << 30)
    nf4 = replace(plain, shape=plain.shape.kept_in("nf4"))
    adapters, made = Adapters.of_tasks(TASKS, plain.shape), 4 * 256 * 768 / 2
    found = [measure_trial(sweep, 2, 1, 256)[0] for sweep in (plain, nf4)]
    for sweep, rank in zip((plain, nf4), found, strict=True):
        parts = estimate_memory(sweep.shape, 2, 1, adapters, "fp32", OURS).parts(256)
        expected = parts.weight_bytes - (made if sweep is nf4 else 0)
        assert rank.weight_bytes == pytest.approx(expected, rel=0.05)
    assert found[1].activation_bytes - found[0].activation_bytes < 3 * made
    assert nf4.settings()["base_precision"] == "nf4" and plain.settings() != nf4.settings()
