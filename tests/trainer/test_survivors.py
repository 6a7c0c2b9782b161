"""The plan on which the GPUs that are left go on, or why there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lobra.common.errors import ConfigError
from lobra.layout.placement import placed
from lobra.layout.plan import Plan
from lobra.profiler.profiles import MemoryProfile
from lobra.trainer.replanner import note_move, read_replans
from lobra.trainer.run_spec import Admission, Replanning, RunSpec
from lobra.trainer.survivors import survivors_plan
from tests.model.support import save_llama
from tests.trainer.alone import VOCAB
from tests.trainer.live import sharding_costs
from tests.trainer.support import make_plan, make_run, random_dataset, small_task
from tests.trainer.test_replanner import MEMORY

#: One GPU holds 512 tokens, two hold 1,024.
PLAN = make_plan([(2, 1), (2, 1), (1, 1), (1, 1)], 512)
SHORT, LONG = 500, 1000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("survivors") / "base", vocab_size=VOCAB)


def run_of(folder: Path, base: Path, longest: int) -> RunSpec:
    """Return a run of one task on six ranks, whose sequences are all about as long."""
    return make_run(
        folder, base, (small_task(global_batch_size=8, steps=12),),
        [random_dataset(20, longest - 10, longest, VOCAB, 0)], PLAN, 12,
        admission=Admission(PLAN, folder.parent, MEMORY), replanning=Replanning("tiny", 6, 6),
        cost_model=sharding_costs(4),
    )  # fmt: skip


def fits(plan: Plan, nodes: tuple[int, ...]) -> bool:
    """Whether nodes, filled in order, have a plan's ranks and no group of shards on two."""
    node_of = [node for node, size in enumerate(nodes) for _ in range(size)][: plan.num_gpus]
    world = placed(plan)
    assert world is not None and world.num_ranks == plan.num_gpus
    groups = [stage for replica in world.replicas for stage in replica]
    return all(len({node_of[rank] for rank in group}) == 1 for group in groups)


@pytest.mark.parametrize(
    ("longest", "nodes"), [(SHORT, (1,)), (LONG, (1,)), (LONG, (1, 1)), (LONG, (1, 2))]
)
def test_there_is_a_plan_if_the_longest_sequence_fits(
    longest: int, nodes: tuple[int, ...], base: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", base, longest)
    held = max(
        row.max_tokens
        for row in MEMORY.rows
        if row.tp * row.pp <= sum(nodes) and row.tp <= max(nodes)
    )
    if held < longest:
        with pytest.raises(ConfigError, match=rf"{sum(nodes)} GPUs holds .*largest holds {held}\)"):
            survivors_plan(run, None, nodes)
        return
    found = survivors_plan(run, None, nodes)
    assert found.plan.max_tokens >= longest and found.num_steps == 12
    assert fits(found.plan, nodes)


def test_what_would_hold_it_is_named(base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", base, LONG)
    with pytest.raises(ConfigError, match=r"would hold it are out: <1,2>: needs 2 GPUs of 1; <2,1"):
        survivors_plan(run, None, [1])
    no_pipeline = MemoryProfile(tuple(row for row in MEMORY.rows if row.pp == 1))
    flat = replace(run, admission=Admission(PLAN, tmp_path, no_pipeline))
    with pytest.raises(ConfigError, match=r"are out: <2,1>: tp 2 is more than a host has GPUs;"):
        survivors_plan(flat, None, [1, 1])
    with pytest.raises(ConfigError, match="no GPU is left"):
        survivors_plan(run, None, [0])


def test_it_is_noted_with_what_a_step_takes(base: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", base, SHORT)
    run.output_dir.mkdir(exist_ok=True)
    found = survivors_plan(run, None, [2])
    noted = note_move(run.output_dir, found, run.plan, 7, "host b (4 GPUs) is lost")
    assert read_replans(run.output_dir) == [noted]
    assert noted.switched and noted.proposed_step_s > noted.present_step_s and noted.gain_s < 0
    said = str(noted)
    assert said.startswith(f"host b (4 GPUs) is lost: the run goes on on {found.plan} instead of")
    assert f"takes {noted.proposed_step_s:.3g} s instead of {noted.present_step_s:.3g} s" in said
