"""Profile, plan and train on real fine-tuning data, end to end, through the command lines.

Four data sets, GPT-2's BPE and a small random Llama; skipped where the shared data is absent.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lobra.cli import main
from lobra.commands.plan import main as plan_main
from lobra.layout.layout import Layout
from lobra.layout.plan import ReplicaGroup, load_plan, make_plan, save_plan
from lobra.layout.world import shard_range
from lobra.tasks.dataset import TokenizedDataset
from lobra.trainer.batches import draw_sequences
from lobra.trainer.prepare import prepare
from lobra.trainer.request import TrainRequest
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from tests.model.support import save_llama
from tests.trainer.recording import RecordedResult
from tests.trainer.support import steps_of

HIDDEN, FFN, LAYERS, VOCAB = 64, 160, 4, 50257
NUM_RANKS = 3
TASK_NAMES = ("dolly_3k", "codegen_gpt4", "pubmedqa", "us_bills_115_all")


def save_base(folder: Path, shared: Path) -> Path:
    """Save a small random Llama with GPT-2's tokenizer and return its folder."""
    save_llama(
        folder,
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        max_position_embeddings=1024,
    )
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(shared / "tokenizers" / f"gpt2-{name}", folder / name)
    return folder


def train_recorded(request: TrainRequest) -> tuple[RunSpec, list[Any]]:
    run = prepare(request)
    return run, run_local(run, "tests.trainer.recording:train_recorded")


def check_every_sequence_once(run: RunSpec, ranks: list[RecordedResult], num_steps: int) -> None:
    datasets = [TokenizedDataset.load(run.data_folder(number)) for number in range(len(run.tasks))]
    trained = [batch for rank in ranks for batch in rank.trained]
    for step in range(num_steps):
        drawn = [
            sequence
            for number, (task, data) in enumerate(zip(run.tasks, datasets, strict=True))
            for sequence in draw_sequences(number, task, data, run.seed, step)
        ]
        done = [sequence for part in trained if part.step == step for sequence in part.sequences]
        assert sorted(done) == sorted((sequence.task, sequence.index) for sequence in drawn)


def check_only_its_share_is_held(run: RunSpec, ranks: list[RecordedResult]) -> None:
    norms = 2 * HIDDEN * 4
    layer = (HIDDEN * (HIDDEN + 2 * HIDDEN // 2 + HIDDEN) + 3 * HIDDEN * FFN) * 4
    for layout, replica in zip(run.world.layouts, run.world.replicas, strict=True):
        for stage, stage_ranks in enumerate(replica):
            for tp_index, rank in enumerate(stage_ranks):
                tp, pp = layout.tp, layout.pp
                layers = len(shard_range(LAYERS, pp, stage))
                rows = len(shard_range(VOCAB, tp, tp_index)) * HIDDEN * 4
                share = layers * (layer // tp + norms)
                share += rows if stage == 0 else 0
                share += rows + HIDDEN * 4 if stage == pp - 1 else 0
                assert ranks[rank].held_bytes == share
                assert ranks[rank].loaded_bytes == share


@pytest.mark.long
def test_two_real_data_sets(shared: Path, project_root: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shared)
    config = json.loads((project_root / "trainer_config" / "real4.json").read_text())
    tasks = [{**task, "global_batch_size": 3, "steps": 2} for task in config["task"][:2]]
    (tmp_path / "two.json").write_text(
        json.dumps({**config, "train_task_num": 2, "task": tasks}), encoding="utf-8"
    )
    groups = [ReplicaGroup(Layout(1, 1), 1, 512), ReplicaGroup(Layout(2, 1), 1, 1024)]
    save_plan(make_plan(groups), tmp_path / "plan.yaml")
    rows = [
        f"{tp},{s},{b},{1 + b * s / 50 / tp}" for tp in (1, 2) for s in (64, 512) for b in (1, 2)
    ]
    (tmp_path / "time.csv").write_text("\n".join(["tp,seq_len,mbs,time", *rows]) + "\n")
    request = TrainRequest(
        model=str(base),
        trainer_config=str(tmp_path / "two.json"),
        strategy_config=str(tmp_path / "plan.yaml"),
        time_profile=tmp_path / "time.csv",
        output_dir=tmp_path / "run",
        data_dir=shared / "data",
        device="cpu",
        max_seq_length=512,
    )
    run, ranks = train_recorded(request)
    assert len(steps_of(run)) == 2
    check_every_sequence_once(run, ranks, 2)
    check_only_its_share_is_held(run, ranks)


@pytest.mark.long
def test_four_real_data_sets(
    shared: Path, project_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = save_base(tmp_path / "base", shared)
    config = project_root / "trainer_config" / "real4.json"

    common = ["--model", str(base), "--device", "cpu"]
    limit = ["--max-seq-length", "512"]
    assert main(["profile", "time", *common, *limit, "--tp", "1,2", "--load-ranks", "3"]) == 0
    memory = [
        "--num-gpus",
        str(NUM_RANKS),
        "--trainer-config",
        str(config),
        "--memory-budget",
        "110MB",
    ]
    assert main(["profile", "memory", *common, *limit, *memory]) == 0
    plan_arguments = ["--model", str(base), "--num-gpus", str(NUM_RANKS), *limit]
    plan_arguments += ["--trainer-config", str(config), "--strategy-config", "plan.yaml"]
    assert plan_main([*plan_arguments, "--data-dir", str(shared / "data")]) == 0
    plan = load_plan("plan.yaml")
    assert len({group.layout for group in plan.groups}) >= 2, f"{plan} is homogeneous"

    request = TrainRequest(
        model=str(base),
        trainer_config=str(config),
        strategy_config="plan.yaml",
        output_dir=Path("run"),
        data_dir=shared / "data",
        device="cpu",
        max_seq_length=512,
    )
    run, ranks = train_recorded(request)

    steps = steps_of(run)
    assert len(steps) == 20
    for name in TASK_NAMES:
        losses = [step.tasks[name].loss for step in steps]
        assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1, f"{name}: {losses}"
    check_every_sequence_once(run, ranks, 20)
    check_only_its_share_is_held(run, ranks)
