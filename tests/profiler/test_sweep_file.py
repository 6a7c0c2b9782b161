"""A sweep's files: killed at any byte and continued, nothing is lost and nothing done twice."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from lobra.common.errors import ConfigError
from lobra.profiler.profiles import TIME_COLUMNS, load_time_profile, load_time_profiles
from lobra.profiler.sidecar import meta_path, read_meta, write_meta
from lobra.profiler.sweep_file import Restart, open_sweep
from lobra.profiler.sweep_rows import SweepFile
from lobra.profiler.validation import row_spread

SETTINGS = {"model": "tiny", "adapters": [[16, ["q_proj"]]], "precision": "fp32"}
ROWS = [(1, 64, 1, 1.25), (1, 64, 4, 3.5), (2, 128, 1, 2.125), (2, 128, 16, 30.0)]


def opened(path: Path, settings: dict = SETTINGS, **options) -> SweepFile:
    return open_sweep(path, TIME_COLUMNS, 3, settings, kind="measured", **options)


def written(path: Path) -> Path:
    sweep = opened(path)
    for row in ROWS:
        sweep.add(row, {"spread": 0.1})
    return path


def test_killed_at_any_byte_and_continued(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.csv")
    content, sidecar = whole.read_bytes(), meta_path(whole).read_bytes()
    for end in range(len(content) + 1):
        path = tmp_path / f"cut{end}.csv"
        path.write_bytes(content[:end])
        meta_path(path).write_bytes(sidecar)
        sweep = opened(path)
        complete = content[:end].count(b"\n") - 1
        assert len(sweep.done) == max(0, complete)
        for row in ROWS:
            if row[:3] not in sweep.done:
                sweep.add(row, {"spread": 0.1})
        assert path.read_bytes() == content


def test_a_row_has_its_details_and_the_loader_reads_it(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv")
    assert list(load_time_profile(path).time_ms) == [row[3] for row in ROWS]
    meta = read_meta(path)
    assert meta["kind"] == "measured"
    assert meta["settings"] == SETTINGS
    assert meta["rows"]["2,128,16"] == {"spread": 0.1}


def recomputed(path: Path) -> Path:
    sweep = opened(path, memory="full")
    for row in ROWS:
        if row[:3] not in sweep.done:
            sweep.add((*row[:3], 1.4 * row[3]), {"spread": 0.2})
    return path


@pytest.mark.parametrize("first", [written, recomputed])
def test_rows_of_two_policies_share_a_file_and_are_never_mixed_up(
    tmp_path: Path, first: Callable[[Path], Path]
) -> None:
    path = first(tmp_path / "t.csv")
    (recomputed if first is written else written)(path)
    kept, again = (load_time_profile(path, memory) for memory in ("keep", "full"))
    assert list(kept.time_ms) == [row[3] for row in ROWS]
    assert list(again.time_ms) == [1.4 * row[3] for row in ROWS]
    assert opened(path).details((2, 128, 16)) == {"spread": 0.1}
    assert opened(path, memory="full").details((2, 128, 16)) == {"spread": 0.2}
    opened(path, memory="full").revise((2, 128, 16, 41.0), {"spread": 0.3})
    opened(path, memory="full").skip((4, 1, 1), "ran out of memory")
    assert opened(path).skipped == set()
    assert opened(path, memory="full").skipped == {(4, 1, 1)}
    assert list(load_time_profile(path).time_ms) == [row[3] for row in ROWS]
    assert load_time_profile(path, "full").time_ms[-1] == 41.0
    assert (row_spread(kept, 1), row_spread(again, 1)) == (0.1, 0.2)


def test_of_two_policies_killed_at_any_byte_and_continued(tmp_path: Path) -> None:
    """A file of before, without the column, gets it in one piece; nothing of it is lost."""
    whole = recomputed(written(tmp_path / "whole.csv"))
    content, sidecar = whole.read_bytes(), meta_path(whole).read_bytes()
    plain = written(tmp_path / "plain.csv").read_bytes()
    path = tmp_path / "cut.csv"
    for text in [plain, *(content[:end] for end in range(len(content) + 1))]:
        path.write_bytes(text)
        meta_path(path).write_bytes(sidecar)
        for memory, factor in (("keep", 1.0), ("full", 1.4)):
            sweep = opened(path, memory=memory)
            for row in ROWS:
                if row[:3] not in sweep.done:
                    sweep.add((*row[:3], factor * row[3]), {"spread": 0.1})
        profiles = load_time_profiles(path)
        assert sorted(profiles["keep"].time_ms) == sorted(row[3] for row in ROWS)
        assert sorted(profiles["full"].time_ms) == sorted(1.4 * row[3] for row in ROWS)
    assert path.read_bytes() == content


def test_a_skipped_row_is_remembered(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv")
    opened(path).skip((4, 1, 1), "ran out of memory")
    assert opened(path).skipped == {(4, 1, 1)}


def test_other_settings_are_never_mixed(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r'precision was "fp32", is now "bf16".*--restart'):
        opened(path, SETTINGS | {"precision": "bf16"})
    assert path.read_bytes() == before
    assert opened(path, SETTINGS | {"precision": "bf16"}, restart="changed").done == {}
    assert path.with_name("t.csv.old").read_bytes() == before


def test_restart_changed_continues_equal_settings_and_always_does_not(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv")
    assert len(opened(path, restart="changed").done) == len(ROWS)
    assert opened(path, restart="always").done == {}
    assert path.with_name("t.csv.old").is_file()


def test_a_file_without_sidecar_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    content = "tp,seq_len,mbs,time\n1,128,1,3.08\n1,128,2,3.47"  # no last line end, as LobRA's
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="without its sidecar"):
        opened(path)
    assert path.read_text(encoding="utf-8") == content
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    opened(path, restart="changed")
    assert path.with_name("published.csv.old").read_text(encoding="utf-8") == content


@pytest.mark.parametrize("content", [b"a note without line end", b"\xff\xfe\x00"])
def test_what_is_no_profile_is_not_emptied(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    opened(path)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 1: the columns are|not UTF-8 text"):
        opened(path)
    assert path.read_bytes() == content


def test_every_earlier_measurement_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv")
    opened(path, restart="always").add((1, 64, 1, 7.0), {})
    opened(path, restart="always").add((1, 64, 1, 8.0), {})
    opened(path, restart="always")
    kept = [path.with_name(f"t.csv.old{suffix}") for suffix in ("", ".2", ".3")]
    assert [old.read_text().count("\n") for old in kept] == [5, 2, 2]
    assert meta_path(path).with_name("t.meta.json.old.3").is_file()


def test_two_sweeps_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with (tmp_path / ".t.csv.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another sweep is writing"):
            opened(path)
    assert not meta_path(path).exists()
    assert opened(path).done == {}


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "file" / "t.csv", "cannot be written"),
        (Path("/proc/nothing/t.csv"), "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(place)


@pytest.mark.parametrize("part", ["settings", "environment", "rows", "skipped"])
def test_a_sidecar_of_other_types_is_refused(tmp_path: Path, part: str) -> None:
    path = written(tmp_path / "t.csv")
    write_meta(path, read_meta(path) | {part: None})
    with pytest.raises(ConfigError, match=f"{part} = null: want an object"):
        opened(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,64", "2 values for 4 columns"),
        ("1,64,x,2.0", "invalid literal"),
        ("1,64,xx,2.0", "mbs: 'xx' is not one"),
        ("1,64,0,2.0", "mbs: 0 is not one"),
        ("1,256,1,nan", "time: nan cannot be"),
        ("1,256,1,-5", "time: -5 cannot be"),
        ("1,256,1,0", "time: 0 cannot be"),
        ("1,256,1,fast", "could not convert"),
        ("1,64,1,9.0", "there twice"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path / "t.csv")
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n2,64,,\n")
    with pytest.raises(ConfigError) as error:
        opened(path)
    assert len(error.value.problems) == 2, "all mistakes at once"
    assert "line 6" in str(error.value)
    assert message in str(error.value)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv")
    path.write_text("tp,seq_len,time\n1,2,3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="expected tp,seq_len,mbs,time"):
        opened(path)


def test_rows_of_another_machine_are_not_continued(tmp_path: Path) -> None:
    def opened_on(name: str, restart: Restart = "never") -> SweepFile:
        environment = {"hardware": {"name": name}}
        path = tmp_path / "t.csv"
        return open_sweep(
            path, TIME_COLUMNS, 3, {}, kind="measured", restart=restart, environment=environment
        )

    opened_on("H200").add((1, 64, 1, 2.0), {})
    assert len(opened_on("H200").done) == 1
    with pytest.raises(ConfigError, match="was measured on H200, this machine has A100"):
        opened_on("A100")
    assert opened_on("A100", "changed").done == {}


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"hardware": {"num_cores": 1}}, {"hardware": {"num_cores": 2}}, "num_cores 1, this"),
        ({"versions": {"torch": "2.13.0"}}, {"versions": {"torch": "2.14.0"}}, "torch 2.13.0"),
    ],
)
def test_nor_are_rows_of_other_cores_or_another_torch(
    tmp_path: Path, before: dict, now: dict, message: str
) -> None:
    opened(tmp_path / "t.csv", environment=before).add((1, 64, 1, 2.0), {})
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path / "t.csv", environment=now)


def test_what_differs_is_told_in_short(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    figures = {"memory_gib": 40, "bf16_tflops": 312}
    mine = SETTINGS | {"accelerator": {"name": "A", **figures}, "adapters": [[16, ["q_proj"]]] * 2}
    opened(path, mine).add(ROWS[0], {})
    for changed, told in (
        ({"accelerator": {"name": "B", "memory_gib": 80}}, 'accelerator.name was "A", is now "B"'),
        (
            {"accelerator": {"name": "A", **figures, "memory_gib": 80}},
            "memory_gib was 40, is now 80",
        ),
        ({"adapters": [[16, ["q_proj"]]]}, "adapters were 2, are now 1"),
        (
            {"adapters": [[16, ["q_proj"]], [8, []]]},
            'adapters[1] was [16, ["q_proj"]], is now [8, []]',
        ),
        ({"quick": True}, "quick was not given, is now true"),
    ):
        with pytest.raises(ConfigError) as caught:
            opened(path, mine | changed)
        (problem,) = caught.value.problems
        assert f"{told})" in problem and problem.count(" was ") == (" were " not in told) + 1
