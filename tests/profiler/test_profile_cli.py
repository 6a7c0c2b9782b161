"""`lobra profile` as users call it: exit codes, files, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from profiler.profiles import load_memory_profile, load_time_profile, read_meta, write_meta
from tests.model.support import save_llama
from trainer.cli import main

ESTIMATE = ["--estimate", "--accelerator", "A800-80GB", "--runtime", "hetu"]


def memory(path: Path, *more: str) -> int:
    arguments = ["--model", "70B", "--num-gpus", "16", "--trainer-config", "exp_task12"]
    return main(["profile", "memory", *arguments, "--output", str(path), *more])


def test_both_tables_of_a_large_model_without_weights_or_gpu(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    assert memory(path, *ESTIMATE) == 0
    table = load_memory_profile(path)
    assert table.meta["kind"] == "estimated"
    assert table.max_tokens(16, 1) >= 16384 > table.max_tokens(8, 1) > table.max_tokens(4, 1)
    before = path.read_bytes()
    assert memory(path, *ESTIMATE) == 0
    assert path.read_bytes() == before
    assert memory(path, "--estimate", "--accelerator", "H200-141GB") == 2, "other settings"
    assert path.read_bytes() == before

    times = tmp_path / "time.csv"
    command = ["profile", "time", "--model", "70B", "--tp", "1,8,16", "--output", str(times)]
    assert main([*command, *ESTIMATE]) == 0
    profile = load_time_profile(times)
    assert profile.tps == (1, 8, 16)
    assert len(load_time_profile(tmp_path / "head_time.csv")) == len(profile)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--estimate"], "needs --accelerator"),
        (["--accelerator", "A100-40GB"], "give --estimate too"),
        (["--estimate", "--accelerator", "B9000"], "known are A100-40GB"),
        ([*ESTIMATE[:3], "--runtime", "abacus"], "known are deepspeed, hetu"),
        ([*ESTIMATE, "--num-gpus", "0"], "at least 1"),
    ],
)
def test_mistakes_end_2_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    path = tmp_path / "memory.csv"
    assert memory(path, *more) == 2
    assert message in capsys.readouterr().err
    assert not path.exists()


def written(path: Path, noise: float) -> Path:
    generator = np.random.default_rng(0)
    lines = ["tp,seq_len,mbs,time"]
    for s in (64, 128, 256, 512, 1024):
        for b in (1, 2, 4):
            time_ms = (1 + 0.01 * b * s) * np.exp(noise * generator.standard_normal())
            lines.append(f"1,{s},{b},{time_ms}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_good_fit_is_plotted_and_a_poor_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, poor = written(tmp_path / "good.csv", 0.01), written(tmp_path / "poor.csv", 0.6)
    plot = tmp_path / "plots" / "fit.png"
    arguments = ["profile", "fit", "--time-profile", str(good), "--plot", str(plot)]
    assert main(arguments) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["profile", "fit", "--time-profile", str(poor)]) == 1
    output = capsys.readouterr()
    assert "refused" in output.err
    assert "suspicious: tp 1" in output.out


@pytest.mark.ranks
def test_a_single_device_times_a_shard_and_says_so(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama")
    path = tmp_path / "time.csv"
    command = ["profile", "time", "--model", str(folder), "--tp", "1,4", "--single-device"]
    command += ["--device", "cpu", "--max-seq-length", "64", "--output", str(path)]
    assert main(command) == 0
    meta = read_meta(path)
    assert meta["kind"] == "measured on a single device"
    assert "modelled" in meta["settings"]["collectives"]
    assert meta["rows"]["1,64,1"]["modelled_collectives_ms"] == 0
    assert meta["rows"]["4,64,1"]["modelled_collectives_ms"] > 0
    assert load_time_profile(path).tps == (1, 4)
    assert main([*command, "--load-ranks", "4"]) == 2


def test_a_launcher_or_several_hosts_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts, path = tmp_path / "hosts", tmp_path / "time.csv"
    hosts.write_text("# comment\none slots=8\ntwo slots=8\n", encoding="utf-8")
    command = ["profile", "time", "--model", "tiny", "--tp", "1", "--output", str(path)]
    assert main([*command, "--host-file", str(hosts)]) == 2
    assert "names 2 hosts" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(command) == 2
    assert "WORLD_SIZE is 4" in capsys.readouterr().err
    assert not path.exists()


def test_measured_links_go_with_a_single_device_and_need_all_reduces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links = tmp_path / "links.csv"
    links.write_text("kind,ranks,bytes,time\ntransfer,2,1000,0.5\n", encoding="utf-8")
    write_meta(links, {"settings": {"bytes_per_token": 512}})
    command = ["profile", "time", "--model", "tiny", "--tp", "2", "--links", str(links)]
    command += ["--output", str(tmp_path / "time.csv"), "--device", "cpu"]
    assert main(command) == 2
    assert "give that too" in capsys.readouterr().err
    assert main([*command, "--single-device"]) == 2
    assert "no rows of all_reduce" in capsys.readouterr().err
