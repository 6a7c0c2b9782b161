"""A profile of some adapters tells what fits beside others, as measuring those would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.layout.shapes import NAMED_SHAPES
from lobra.profiler.capacity import fitted_to, memory_profile_for, most_growth
from lobra.profiler.memory import MemorySweep, sweep_memory
from lobra.profiler.memory_rank import ADAPTER_BYTES, OPTIMIZER_BYTES, RankMemory
from lobra.profiler.profiles import MEMORY_COLUMNS, load_memory_profile
from lobra.profiler.sweep_file import open_sweep
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES

SHAPE = NAMED_SHAPES["7B"]
LAYOUTS = ((1, 1), (1, 2), (2, 1), (4, 1))
BUDGET = 40 << 30


def tasks(*ranks: int, dropout: float = 0.0) -> tuple[TaskConfig, ...]:
    return tuple(
        TaskConfig(f"task{i}", r, 2.0 * r, TARGET_MODULES, 4, "none", 512, lora_dropout=dropout)
        for i, r in enumerate(ranks)
    )


def memory_by_law(sweep: MemorySweep, tp: int, pp: int, tokens: int) -> list[RankMemory]:
    """13 GB of weights, adapters as they are counted, 1 GB and 1 MB a token of activations.

    And for a token, at each of 7 linears of 32 layers, two bytes for each rank: of all tasks, at
    most 256.
    """
    ranks = min(256, sum(task.rank for task in sweep.tasks))
    elements = sum(SHAPE.adapter_elements(t.rank, t.target_modules) for t in sweep.tasks) // pp
    rank = RankMemory(
        13_000_000_000 // (tp * pp),
        ADAPTER_BYTES * elements,
        OPTIMIZER_BYTES * elements // tp,
        1_000_000_000 + 1_000_000 * tokens // tp + 2 * 7 * 32 * ranks * tokens,
        8 * elements,
    )
    return [rank] * (tp * pp)


def measured(path: Path, *ranks: int, dropout: float = 0.0) -> Path:
    own = tasks(*ranks, dropout=dropout)
    sweep = MemorySweep(Path("unused"), SHAPE, own, LAYOUTS, 65536, BUDGET, "bf16", "cuda")
    file = open_sweep(path, MEMORY_COLUMNS, 3, sweep.settings(), kind="measured")
    sweep_memory(sweep, file, measure=memory_by_law)
    return path


@pytest.mark.parametrize("ranks", [(16,), (16,) * 12, (64,) * 8, (8, 16, 32), (64,) * 20])
def test_capacities_of_other_adapters_are_those_that_would_be_measured(
    tmp_path: Path, ranks: tuple[int, ...]
) -> None:
    profile = load_memory_profile(measured(tmp_path / "max_tokens_7B_6tasks.csv", *(16,) * 6))
    found, notes = fitted_to(profile, tasks(*ranks), SHAPE)
    expected = load_memory_profile(measured(tmp_path / "other.csv", *ranks))
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert (one.tp, one.pp) == (other.tp, other.pp)
        assert abs(one.max_tokens - other.max_tokens) <= 256, "a step by rounding"
    assert f"of 6 adapters were reckoned anew for these {len(ranks)}" in notes[0]


def test_the_same_adapters_in_any_order_are_taken_as_measured(tmp_path: Path) -> None:
    profile = load_memory_profile(measured(tmp_path / "m.csv", 8, 16))
    assert fitted_to(profile, tasks(16, 8), SHAPE) == (profile, ())


def test_an_estimate_is_fitted_to_what_estimating_says(tmp_path: Path) -> None:
    """Never above it by more than a step."""

    def estimated(name: str, count: int) -> Path:
        config = tmp_path / f"{name}.json"
        entry = dict(
            rank=16, lora_alpha=16, target_modules=list(TARGET_MODULES), global_batch_size=4,
            dataset_name="d", context_length=512, steps=1,
        )  # fmt: skip
        config.write_text(json.dumps({"train_task_num": count, "task": [entry] * count}))
        path = tmp_path / f"{name}.csv"
        command = ["profile", "memory", "--model", "7B", "--num-gpus", "4", "--estimate"]
        command += ["--accelerator", "A100-40GB", "--max-seq-length", "65536"]
        assert main([*command, "--trainer-config", str(config), "--output", str(path)]) == 0
        return path

    profile = load_memory_profile(estimated("few", 4))
    found, _ = fitted_to(profile, tasks(*(16,) * 16), SHAPE)
    expected = load_memory_profile(estimated("many", 16))
    assert [(r.tp, r.pp) for r in found.rows] == [(r.tp, r.pp) for r in expected.rows]
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert other.max_tokens * 0.93 - 256 <= one.max_tokens <= other.max_tokens + 256


def test_the_nearest_profile_with_parts_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("exp_result/profile/memory")
    for count in (2, 6):
        measured(folder / f"max_tokens_7B_{count}tasks.csv", *(16,) * count)
    (folder / "max_tokens_7B_8tasks.csv").write_text("tp,pp,sp,max_tokens\n1,1,1,4096\n")
    found, notes = memory_profile_for("7B", tasks(*(16,) * 7))
    assert found.path == folder / "max_tokens_7B_6tasks.csv"
    assert "6 adapters were reckoned anew for these 7" in notes[0]
    assert memory_profile_for("7B", tasks(*(16,) * 8))[0].max_tokens(1, 1) == 4096, "its own"
    with pytest.raises(ConfigError, match="max_tokens_13B_2tasks.csv: no such profile"):
        memory_profile_for("13B", tasks(16, 16))


def test_a_profile_without_parts_is_used_as_it_is_and_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "max_tokens_llama_7B_6tasks.csv"
    path.write_text("tp,pp,sp,max_tokens\n1,1,1,4096\n")
    profile = load_memory_profile(path)
    assert fitted_to(profile, tasks(*(16,) * 6), SHAPE) == (profile, ())
    found, notes = fitted_to(profile, tasks(*(16,) * 9), SHAPE)
    assert found is profile
    assert "is of 6 other adapters than these 9" in notes[0]


def test_an_adapter_of_the_head_counts_where_the_head_is() -> None:
    known, wanted = [[16, TARGET_MODULES]], [[16, (*TARGET_MODULES, "lm_head")]]
    head = 16 * (SHAPE.hidden_size + SHAPE.vocab_size)
    whole = SHAPE.adapter_elements(16, TARGET_MODULES)
    for num_stages in (1, 2, SHAPE.num_layers):
        found = most_growth(known, wanted, SHAPE, num_stages)
        assert found == pytest.approx(1 + head * num_stages / whole)
        assert most_growth(known, 3 * known, SHAPE, num_stages) == 3


def test_dropout_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    profile = load_memory_profile(measured(tmp_path / "m.csv", 16, 16))
    dropping = (tasks(16)[0], replace(tasks(16)[0], name="second", lora_dropout=0.05))
    with pytest.raises(ConfigError, match="measured without lora_dropout, which second has"):
        fitted_to(profile, dropping, SHAPE)
    with_dropout = load_memory_profile(measured(tmp_path / "d.csv", 16, 16, dropout=0.1))
    assert fitted_to(with_dropout, dropping, SHAPE) == (with_dropout, ())


def test_a_profile_without_a_task_s_kind_of_adapter_says_so(tmp_path: Path) -> None:
    path = measured(tmp_path / "m.csv", 16, 16)
    kinds = (replace(tasks(16)[0], adapter="rslora"), replace(tasks(16)[0], adapter="dora"))
    (note,) = memory_profile_for("7B", (kinds[0], replace(kinds[1], name="second")), path)[1]
    assert note.startswith(f"{path}: was measured without adapters such as those of second: ")
