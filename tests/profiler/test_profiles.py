from __future__ import annotations

from pathlib import Path

import pytest

from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.profiler.cost_model import load_cost_model
from lobra.profiler.csv_rows import append_row
from lobra.profiler.lookup import published_memory_path, published_time_path
from lobra.profiler.profiles import (
    MEMORY_COLUMNS,
    TIME_COLUMNS,
    default_memory_path,
    default_time_path,
    load_memory_profile,
    load_time_profile,
)
from lobra.profiler.sidecar import read_meta, write_meta


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "profile.csv"
    path.write_text(text)
    return path


def test_lobras_files_load_unchanged(project_root: Path) -> None:
    times = load_time_profile(project_root / published_time_path("7B"))
    assert len(times) == 250
    assert times.tps == (1, 2, 4, 8)
    memory = load_memory_profile(project_root / published_memory_path("7B", 6))
    assert len(memory.layouts) == 14
    assert memory.max_tokens(1, 8) == 4096
    assert memory.max_tokens(16, 1) == 0


def test_every_mistake_of_a_time_profile_is_named(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "tp,seq_len,mbs,time\n1,128,1,nan\n1,x,1,3.0\n1,256,2,-1\n1,256\n0,256,1,2.0\n1,512,1,4.0\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_time_profile(path)
    text = str(caught.value)
    for part in ("line 2", "line 3", "line 4", "line 5", "line 6", "not finite", "'x'", str(path)):
        assert part in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp,seq_len,time\n1,128,2.0\n", "column mbs is missing"),
        ("", "missing"),
        ("tp,seq_len,mbs,time\n", "has no rows"),
    ],
)
def test_a_file_that_is_no_time_profile_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_time_profile(written(tmp_path, text))


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lobra profile memory"):
        load_memory_profile(tmp_path / "none.csv")


def test_a_memory_table_that_is_not_monotone_is_refused(tmp_path: Path) -> None:
    good = "tp,pp,sp,max_tokens\n1,1,1,2048\n2,1,1,1900\n1,2,1,2048\n"
    assert load_memory_profile(written(tmp_path, good)).max_tokens(2, 1) == 1900  # one step less
    bad = "tp,pp,sp,max_tokens\n1,1,1,4096\n2,1,1,2048\n"
    with pytest.raises(ConfigError, match=r"not monotone: <2,1> holds 2048"):
        load_memory_profile(written(tmp_path, bad))


def test_repeated_layouts_are_refused(tmp_path: Path) -> None:
    text = "tp,pp,sp,max_tokens\n1,1,1,2048\n1,1,1,4096\n"
    with pytest.raises(ConfigError, match="already on line 2"):
        load_memory_profile(written(tmp_path, text))


def test_rows_are_appended_and_a_torn_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.csv"
    append_row(path, TIME_COLUMNS, (1, 128, 1, 3.5))
    with path.open("a") as file:
        file.write("1,256,1,4.")
    append_row(path, TIME_COLUMNS, (1, 256, 1, 4.25))
    times = load_time_profile(path)
    assert times.time_ms.tolist() == [3.5, 4.25]
    with pytest.raises(ValueError, match="values for the columns"):
        append_row(path, MEMORY_COLUMNS, (1, 2))


def test_the_sidecar_goes_with_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "profile.csv"
    assert read_meta(path) == {}
    write_meta(path, {"hardware": "CPU", "measured": True})
    append_row(path, TIME_COLUMNS, (1, 128, 1, 3.5))
    assert load_time_profile(path).meta == {"hardware": "CPU", "measured": True}
    (tmp_path / "profile.meta.json").write_text("[1]")
    with pytest.raises(
        ConfigError, match=r"profile\.meta\.json: holds \[1\], want an object; restore"
    ):
        read_meta(path)


def test_default_paths_are_the_contracts() -> None:
    assert str(default_time_path("7B")) == "exp_result/profile/cost_model/profile_time_7B.csv"
    assert default_memory_path("models/my", 4).name == "max_tokens_my_4tasks.csv"


def test_the_committed_profiles_of_a_cpu_load_and_say_how_they_were_made(
    project_root: Path,
) -> None:
    folder = project_root / "exp_result" / "profile" / "cpu-2-cores"
    model = load_cost_model("tiny", folder / "profile_time_tiny.csv")
    assert sorted(model.layers) == [1, 2]
    assert set(model.head) == {1, 2}
    assert model.collectives is not None
    memory = load_memory_profile(folder / "max_tokens_tiny_4tasks.csv")
    assert {Layout(1, 1), Layout(1, 2), Layout(2, 1)} <= set(memory.layouts)
    for path in folder.glob("*.csv"):
        assert read_meta(path)["kind"] == "measured"
        assert read_meta(path)["environment"]["hardware"]["device"] == "cpu"
