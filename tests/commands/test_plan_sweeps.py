"""What-if: other GPUs, accelerators, context limits and prices, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lobra.cli import main as lobra
from lobra.commands.plan import main
from lobra.layout.plan import load_plan
from lobra.profiler.profiles import default_memory_path, load_memory_profile
from lobra.tasks.lengths import load_lengths
from tests.commands.test_plan import arguments
from tests.commands.test_plan import files as files

LLAMA_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SWEEP = ["--sweep-accelerator", "H100,L40S", "--price-per-gpu-hour", "H100=2.5,L40S=0.8"]


def without_profiles(*more: str) -> list[str]:
    return [
        *("--num-gpus", "2", "--trainer-config", "config.json", "--strategy-config", "plan.yaml"),
        *("--lengths", "lengths.json", "--pattern", "BALANCE", "--time-limit", "2"),
        *more,
    ]


def test_a_model_of_which_there_is_a_config_alone_is_planned_for_accelerators(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "llama").mkdir()
    (files / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    more = ["--model", "llama", "--json", *SWEEP, "--plot", "a.png"]
    assert main(without_profiles(*more)) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    h100, l40s = result["sweep"]
    assert [h100["accelerator"], l40s["accelerator"]] == ["H100-80GB", "L40S-48GB"]
    assert h100["step_time_s"] < l40s["step_time_s"]
    lengths = load_lengths(Path("lengths.json")).values()
    tokens = sum(12 * np.minimum(values, 2048).mean() for values in lengths)
    for entry, price in ((h100, 2.5), (l40s, 0.8)):
        assert entry["tokens_per_step"] == pytest.approx(tokens, rel=0.01)
        cost = entry["mean_gpu_seconds"] / 3600 * price / entry["tokens_per_step"] * 1e6
        assert entry["cost_per_million_tokens"] == pytest.approx(cost, rel=1e-4)
    assert result["plan"] == h100["plan"]  # without a profile, the plan is for the first
    told = " ".join(captured.err.split())
    assert "llama has no time profile: the plan is for H100-80GB, ESTIMATED" in told
    assert load_plan("plan.yaml").meta["time_profile"]["file"] == "estimate for H100-80GB"
    assert (files / "a.png").stat().st_size > 1000


def test_shorter_contexts_train_fewer_tokens_in_less_time(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--sweep-context", "512,2048", "--sweep-gpus", "2:4:2", "--price-per-gpu-hour", "1"]
    more += ["--pattern", "BALANCE", "--plot", "a.svg", "--json", "--num-tasks", "2"]
    assert main(arguments(*more)) == 0
    found = json.loads(capsys.readouterr().out)["sweep"]
    places = [(entry["context"], entry["gpus_available"]) for entry in found]
    assert places == [(512, 2), (512, 4), (2048, 2), (2048, 4)]
    for short, long in ((found[0], found[2]), (found[1], found[3])):
        assert short["tokens_per_step"] < long["tokens_per_step"]
        assert short["step_time_s"] < long["step_time_s"]
    lengths = load_lengths(Path("lengths.json"))
    cut_share = sum((values > 512).mean() for values in lengths.values()) / 2
    assert found[0]["cut_share"] == pytest.approx(cut_share, abs=0.01)
    assert (files / "a.svg").stat().st_size > 1000


def test_rows_whose_search_was_stopped_say_so(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lobra.planner.sweep.MATTERS", 0.001)
    words = "* stopped before the search was complete, and more than 2 % from the bound;"
    for limit, is_stopped in (("0.001", True), ("600", False)):
        more = ["--sweep-gpus", "2:4:2", "--time-limit", limit, "--plot", "a.svg", "--dry-run"]
        assert main(arguments(*more, "--json")) == 0
        captured = capsys.readouterr()
        result = json.loads(captured.out)
        assert [row["complete"] for row in result["sweep"]] == [not is_stopped] * 2
        assert result["complete"] != is_stopped
        assert any("stopped after" in note for note in result["notes"]) == is_stopped
        _, table = captured.err.split("what if")
        rows = [line.rstrip() for line in table.splitlines() if "<" in line]
        gaps = [row["sampled"]["gap"] for row in result["sweep"]]
        is_marked = [is_stopped and gap > 0.001 for gap in gaps]
        assert any(is_marked) == is_stopped
        assert [row.endswith(" *") for row in rows] == is_marked
        assert (words in " ".join(table.split())) == is_stopped
        assert ("stopped by the time limit" in Path("a.svg").read_text()) == is_stopped


def test_a_price_alone_tells_what_the_plan_costs(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments("--pattern", "BALANCE", "--price-per-gpu-hour", "2", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    (entry,) = result["sweep"]
    assert entry["plan"] == result["plan"]
    assert entry["cost_per_million_tokens"] > 0


def test_all_mistakes_are_told_at_once(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--sweep-accelerator", "H100,X9,A100", "--sweep-context", "many", "--sweep-gpus", "no"]
    more += ["--price-per-gpu-hour", "free,B200=3", "--plot", "a.txt", "--accelerators", "no.yaml"]
    assert main(arguments(*more)) == 2
    told = capsys.readouterr().err
    for words in ("'no'", "'many'", "'free'", "a.txt", "no.yaml"):
        assert words in told
    assert main(arguments(*more[:-2])) == 2
    told = capsys.readouterr().err
    for words in ("'X9'", "'A100'", "'B200' is not swept"):
        assert words in told
    assert "Traceback" not in told


def test_a_base_in_four_bits_has_room_for_more_tokens(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    estimate = ["--model", "7B", "--estimate", "--accelerator", "A100-40GB"]
    of_tasks = ["--trainer-config", "config.json", "--num-gpus", "2", "--max-seq-length", "65536"]
    plan = ["--model", "7B", *without_profiles("--json")]
    tokens = {}
    for kept in ("bf16", "nf4"):
        own = ["--base-precision", kept]
        assert lobra(["profile", "memory", *estimate, *of_tasks, *own]) == 0
        assert lobra(["profile", "time", *estimate, "--tp", "1,2", *own]) == 0
        capsys.readouterr()
        assert main([*plan, *own]) == 0
        (group, *_) = json.loads(capsys.readouterr().out)["plan"]
        tokens[kept] = load_memory_profile(default_memory_path(f"7B{'_nf4' * (kept == 'nf4')}", 2))
        assert load_plan("plan.yaml").meta.get("base_precision") == {"nf4": "nf4"}.get(kept)
        assert group["max_tokens"] <= tokens[kept].max_tokens(group["tp"], group["pp"])
    assert tokens["nf4"].max_tokens(1, 1) > 1.3 * tokens["bf16"].max_tokens(1, 1)
    times = "exp_result/profile/cost_model/profile_time_7B_nf4.csv"
    assert main([*plan, "--time-profile", times]) == 2
    told = capsys.readouterr().err
    assert f"{times}: is of a base in nf4, this one is not quantised" in told


def test_what_the_model_cannot_have_is_told_without_profiles_too(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "llama").mkdir()
    (files / "llama/config.json").write_text(json.dumps(LLAMA_8B))
    config = json.loads((files / "config.json").read_text())
    config["task"][1] |= {"rank_pattern": {"k_pro": 2}}
    (files / "config.json").write_text(json.dumps(config))
    assert main(without_profiles("--model", "llama", *SWEEP)) == 2
    told = capsys.readouterr().err
    assert "config.json: task[1].rank_pattern: 'k_pro' fits nothing that the adapter is on" in told
