"""Synthetic lengths reach the published moments; statistics of samples are what theory says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.published import LENGTHS, SETUPS, parse_plan
from experiments.statistics import mean_interval, reduction_interval
from experiments.synthetic import moments, synthesize
from lobra.layout.placement import place
from lobra.layout.plan import load_plan
from lobra.profiler.lookup import published_memory_path
from lobra.profiler.profiles import load_memory_profile
from lobra.tasks.task_file import load_trainer_config


@pytest.mark.parametrize(("name", "longest"), [("billsum", 16384), ("cnn_dailymail", 8192)])
def test_lengths_have_the_published_moments(name: str, longest: int) -> None:
    wanted = LENGTHS[name]
    made = synthesize(wanted, longest, seed=3)
    assert made.lengths.max() <= longest
    assert made.lengths.min() >= 1
    assert np.mean(made.lengths) == pytest.approx(wanted.mean, rel=0.002)
    assert stats.skew(made.lengths) == pytest.approx(wanted.skewness, rel=0.02)
    assert stats.kurtosis(made.lengths) == pytest.approx(wanted.kurtosis, rel=0.05)
    assert made.lengths.max() > longest / 2  # what LobRA's context lengths and layouts say


def test_seed_decides_the_order_and_nothing_else() -> None:
    first, again, other = (
        synthesize(LENGTHS["dolly"], 8192, seed=s, num_sequences=2000) for s in (1, 1, 2)
    )
    assert np.array_equal(first.lengths, again.lengths)
    assert not np.array_equal(first.lengths, other.lengths)
    assert np.array_equal(np.sort(first.lengths), np.sort(other.lengths))


def test_weighted_moments_are_those_of_repeated_values() -> None:
    values, weights = np.array([3.0, 5.0, 50.0]), np.array([2, 5, 1])
    repeated = np.repeat(values, weights)
    found = moments(values, weights.astype(float))
    assert found.mean == pytest.approx(repeated.mean())
    assert found.skewness == pytest.approx(stats.skew(repeated))
    assert found.kurtosis == pytest.approx(stats.kurtosis(repeated))


def test_interval_of_the_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = mean_interval(rng.normal(10.0, 3.0, size=12))
        covered += interval.low <= 10.0 <= interval.high
    assert 0.91 <= covered / 400 <= 0.985


def test_paired_reduction_ignores_what_both_share() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.uniform(5.0, 50.0, size=60)
    saved = reduction_interval(0.6 * baseline, baseline)
    assert saved.value == pytest.approx(0.4)
    assert saved.high - saved.low < 1e-9
    with pytest.raises(ValueError, match="not the same steps"):
        reduction_interval(baseline[:5], baseline)


def test_published_plans_fill_their_gpus_and_name_every_task() -> None:
    for setup in SETUPS.values():
        config = load_trainer_config(setup.trainer_config)
        assert set(setup.sequential) == {task.name for task in config.tasks}
        for text in (setup.fused, setup.lobra, *setup.sequential.values()):
            gpus = sum(tp * pp * replicas for tp, pp, replicas in parse_plan(text))
            assert gpus == setup.num_gpus, text
    with pytest.raises(ValueError, match="is not <tp,pp>xN"):
        parse_plan("<1,2>x3 4x2")


def test_the_published_deployments_are_plans_to_train_on(project_root: Path) -> None:
    memory = load_memory_profile(project_root / published_memory_path("7B", 6))
    for model, setup in SETUPS.items():
        for kind, text in (("homo", setup.fused), ("hetero", setup.lobra)):
            plan = load_plan(project_root / "strategy_config" / f"{model}_{kind}_fuse.yaml")
            groups = [(g.layout.tp, g.layout.pp, g.replicas) for g in plan.groups]
            assert groups == list(parse_plan(text))
            assert plan.num_gpus == setup.num_gpus and plan.max_tokens == 16384
            assert place(plan, plan.meta["gpus_per_node"]).as_lists()
            if model == "7B":
                for group in plan.groups:
                    measured = memory.max_tokens(group.layout.tp, group.layout.pp)
                    assert group.max_tokens == measured


@pytest.mark.parametrize("copies", [2, 3, 4])
def test_copies_of_the_four_tasks(copies: int) -> None:
    four = load_trainer_config("exp_task4").tasks
    many = load_trainer_config(f"exp_task4x{copies}").tasks
    assert len(many) == 4 * copies
    assert [t.dataset_name for t in many] == [t.dataset_name for t in four] * copies
    assert sum(t.global_batch_size for t in many) == copies * sum(t.global_batch_size for t in four)
