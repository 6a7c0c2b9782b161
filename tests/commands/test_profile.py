"""`lobra profile` as users call it: exit codes, files, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lobra.cli import main
from lobra.commands.profile_time import TimeOptions, _single_devices
from lobra.layout.shapes import NAMED_SHAPES
from lobra.profiler.profiles import load_memory_profile, load_time_profile
from lobra.profiler.sidecar import read_meta, write_meta
from tests.model.support import save_llama

ROOT = Path(__file__).parents[2]
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
        (["--runtime", "hetu", "--accelerators", "none.yaml"], "2 problems"),
        (["--estimate", "--accelerator", "B9000"], "known are A100-40GB"),
        (
            ["--estimate", "--accelerator", "B9000", "--model", "8B", "--num-tasks", "99"],
            "3 problems",
        ),
        ([*ESTIMATE[:3], "--runtime", "abacus"], "known are deepspeed, hetu"),
        ([*ESTIMATE, "--num-gpus", "0"], "--num-gpus 0: want a positive integer"),
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


def test_a_small_profile_is_judged_without_the_six_coefficients(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.csv"
    rows = [f"1,{s},1,{1 + 0.01 * s}" for s in (64, 128, 256, 512, 1024, 2048)]
    path.write_text("\n".join(["tp,seq_len,mbs,time", *rows]) + "\n", encoding="utf-8")
    command = ["profile", "fit", "--time-profile", str(path)]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "fitted" in output.out
    assert "lobra6: left out" in output.err
    assert main([*command, "--kind", "lobra6"]) == 2
    assert "coefficients" in capsys.readouterr().err


def test_options_of_fit_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "good.csv", 0.01)
    command = ["profile", "fit", "--kind", "fitted", "--time-profile", str(path)]
    assert main([*command, "--worst", "-3"]) == 2
    assert "--worst -3" in capsys.readouterr().err
    assert main([*command, "--plot", str(path / "fit.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


TIME = ["profile", "time", "--model", "7B", "--tp", "1,2"]
A100 = ["--estimate", "--accelerator", "A100-40GB"]


@pytest.mark.parametrize(
    ("more", "problems"),
    [
        (["--calibrate", "a.csv", "--runtime", "hetu"], ["--calibrate", "--runtime"]),
        ([*A100, "--load-ranks", "2"], ["--load-ranks"]),
        ([*A100, "--single-device", "--links", "a.csv"], ["--single-device", "--links"]),
        (["--single-device", "--calibrate", "a.csv"], ["--calibrate"]),
        (["--single-device", "--links", "a.csv", *A100[1:]], ["--accelerator tells the links"]),
        ([*A100, "--trainer-config", "none"], ["no trainer configuration 'none'"]),
        (
            [*A100, "--trainer-config", "quickstart", "--lora-rank", "16", "--num-tasks", "4"],
            ["--lora-rank and --trainer-config", "--num-tasks and --trainer-config"],
        ),
        ([*A100, "--head-output", "time.csv"], ["--output time.csv and --head-output time.csv"]),
        ([*A100, "--head-output", "./time.txt"], ["one file for two profiles"]),
    ],
)
def test_options_that_would_be_ignored_or_overwritten(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    problems: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*TIME, "--output", "time.csv", *more]) == 2
    message = capsys.readouterr().err
    assert all(problem in message for problem in problems)
    assert not list(tmp_path.iterdir())


def test_an_estimate_takes_the_largest_rank_of_the_trainer_config(tmp_path: Path) -> None:
    tasks = json.loads((ROOT / "trainer_config" / "quickstart.json").read_text(encoding="utf-8"))
    tasks["task"][1]["rank_pattern"] = {"q_proj": 32}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tasks), encoding="utf-8")
    outputs = {}
    for name, more in {
        "config": ["--trainer-config", str(config)],
        "same": ["--lora-rank", "32"],
        "default": [],
    }.items():
        outputs[name] = tmp_path / f"{name}.csv"
        assert main([*TIME, *A100, "--output", str(outputs[name]), *more]) == 0
    assert outputs["config"].read_text() == outputs["same"].read_text()
    assert outputs["config"].read_text() != outputs["default"].read_text()


def test_what_calibrating_found_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    assert main([*TIME, *A100, "--output", str(first)]) == 0
    calibrated = [*TIME, "--calibrate", str(first), "--output", str(second), "--estimate"]
    assert main([*calibrated, "--accelerator", "RTX3090-24GB"]) == 2
    assert "do not belong together" in capsys.readouterr().err
    assert not second.exists()
    assert main([*calibrated, "--accelerator", "A100-40GB"]) == 0
    assert "mean error that remains 0.0 %" in capsys.readouterr().err


def written_links(path: Path, bytes_per_token: int) -> Path:
    """Write an all-reduce of two ranks: 0.1 ms, and 1e-6 ms a byte."""
    lines = [f"all_reduce,2,{size},{0.1 + 1e-6 * size}" for size in (1000, 100_000)]
    path.write_text("\n".join(["kind,ranks,bytes,time", *lines]) + "\n", encoding="utf-8")
    write_meta(path, {"settings": {"bytes_per_token": bytes_per_token}})
    return path


@pytest.mark.long
@pytest.mark.ranks
def test_a_single_device_times_a_shard_and_says_so(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "llama")
    path, links = tmp_path / "time.csv", written_links(tmp_path / "links.csv", 256)
    command = ["profile", "time", "--model", str(folder), "--tp", "1,4", "--single-device"]
    command += ["--links", str(links), "--device", "cpu", "--max-seq-length", "64"]
    command += ["--output", str(path)]
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
    command = ["profile", "time", "--model", "tiny", "--tp", "2", "--device", "cpu"]
    command += ["--output", str(tmp_path / "time.csv")]
    assert main([*command, "--links", str(links)]) == 2
    assert "give that too" in capsys.readouterr().err
    assert main([*command, "--single-device", "--links", str(links)]) == 2
    assert "no rows of all_reduce" in capsys.readouterr().err
    assert main([*command, "--single-device", *A100[1:]]) == 2
    assert "on a CPU always these" in capsys.readouterr().err


def test_measured_links_may_be_of_another_model(tmp_path: Path) -> None:
    links = tmp_path / "links.csv"
    options = TimeOptions(model="7B", tp="2", single_device=True, links=links)
    for bytes_per_token in (512, 8192):
        written_links(links, bytes_per_token)
        (found,) = _single_devices(options, NAMED_SHAPES["7B"], (), "bf16", "cpu", (2,))
        assert found.layer_ms == pytest.approx((4 * 0.1, 4 * 1e-6 * 2 * 4096))
