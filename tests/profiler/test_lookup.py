"""Which profiles are taken: those named, one's own, LobRA's; and what is told where none is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.profiler.capacity import memory_profile_for
from lobra.profiler.lookup import (
    own_memory_path,
    planning_paths,
    provenance_note,
    published_memory_path,
    published_time_path,
    time_path,
)
from lobra.profiler.profiles import default_memory_path, default_time_path
from lobra.profiler.sidecar import meta_path
from lobra.tasks.task_file import load_trainer_config

PUBLISHED = (
    published_time_path("7B"),
    Path("exp_result/profile/memory/max_tokens_llama_7B_6tasks.csv"),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_root: Path) -> Path:
    """A folder with LobRA's profile of 7B and nothing else."""
    monkeypatch.chdir(tmp_path)
    for path in PUBLISHED:
        for one in (path, path.with_suffix(".meta.json")):
            one.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(project_root / one, one)
    return tmp_path


def own(path: Path, text: str = "a\n") -> Path:
    path.write_text(text)
    return path


def test_the_published_profile_serves_until_there_is_an_own_one(place: Path) -> None:
    assert planning_paths("7B", 6) == PUBLISHED
    assert planning_paths("7B", 2) == PUBLISHED, "the nearest number of tasks"
    assert time_path("7B") == PUBLISHED[0]
    mine = own(default_time_path("7B")), own(default_memory_path("7B", 6))
    assert planning_paths("7B", 6) == mine
    assert time_path("7B") == mine[0]
    assert own_memory_path("7B", 6) == mine[1]


@pytest.mark.parametrize("own_one", [0, 1])
def test_own_profiles_are_not_combined_with_the_published_one_unasked(
    place: Path, own_one: int
) -> None:
    mine = default_time_path("7B"), default_memory_path("7B", 6)
    own(mine[own_one])
    with pytest.raises(ConfigError) as caught:
        planning_paths("7B", 6)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{mine[1 - own_one]}: no such profile")
    for way in ("measure it with", "--estimate --accelerator", "name another", "max_tokens_llama"):
        assert way in problem or (way == "max_tokens_llama" and "profile_time_llama" in problem)
    named = PUBLISHED[1 - own_one]
    found = planning_paths("7B", 6, *((None, named) if own_one == 0 else (named, None)))
    assert set(found) == {mine[own_one], named}


def test_naming_one_of_the_published_pair_is_asking_for_both(place: Path) -> None:
    assert planning_paths("7B", 6, time=PUBLISHED[0]) == PUBLISHED
    assert planning_paths("7B", 6, memory=PUBLISHED[1]) == PUBLISHED


def test_both_missing_profiles_are_told(place: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planning_paths("13B", 4)
    assert len(caught.value.problems) == 2
    assert "such as" not in str(caught.value), "there is none of 13B to name"


def test_the_published_profile_says_on_what_it_was_measured(place: Path) -> None:
    for path in PUBLISHED:
        assert "LobRA's authors" in str(provenance_note(path))
        assert "A100-40GB" in str(provenance_note(path))
    assert provenance_note(own(default_time_path("7B"))) is None


def test_nothing_is_ever_written_to_the_published_profile(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    command = ["profile", "time", "--model", "7B", "--tp", "1", "--estimate"]
    command += ["--accelerator", "A100-40GB", "--max-seq-length", "256"]
    for restart in ("never", "changed", "always"):
        more = ["--restart", restart, "--output", str(PUBLISHED[0])]
        assert main([*command, *more]) == 2
        assert "was published by others and is kept as it is" in capsys.readouterr().err
    assert main(command) == 0
    assert time_path("7B") == default_time_path("7B")
    assert "ESTIMATED for A100-40GB" in str(provenance_note(time_path("7B")))
    assert {path: path.read_bytes() for path in before} == before


def test_capacities_for_other_tasks_say_that_they_are_of_six(
    place: Path, project_root: Path
) -> None:
    tasks = load_trainer_config(str(project_root / "trainer_config/exp_task4.json")).tasks
    profile, notes = memory_profile_for("7B", tasks, published_memory_path("7B", 4))
    assert profile.max_tokens(8, 1) == 16384
    assert any("is of 6 other adapters than these 4" in note for note in notes)


def test_a_quantised_base_has_profiles_of_its_own(place: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        planning_paths("7B", 6, base_precision="nf4")
    assert len(caught.value.problems) == 2
    for problem in caught.value.problems:
        assert "--base-precision nf4`" in problem and "such as LobRA" not in problem
    assert time_path("7B", "nf4").name == "profile_time_7B_nf4.csv"
    mine = own(default_memory_path("7B_nf4", 6))
    meta_path(mine).write_text('{"rows": {"1,1,1": {"parts": {"tokens": 256}}}}')
    assert own_memory_path("7B", 5, "nf4") == mine
    assert own_memory_path("7B", 5) != mine, "of another base"
    assert planning_paths("7B", 6) == planning_paths("7B", 6, base_precision="bf16") == PUBLISHED
