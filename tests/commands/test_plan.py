from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lobra.cli import main as lobra
from lobra.commands.output import write_problem
from lobra.commands.plan import by_reason, main
from lobra.commands.planning import PlanningOptions, read_inputs
from lobra.common.errors import ConfigError, Problems
from lobra.layout.plan import load_plan

TIMES = "tp,seq_len,mbs,time\n" + "".join(
    f"{tp},{s},{b},{1.0 + b * s / (200 * tp**0.8)}\n"
    for tp in (1, 2, 4)
    for s in (128, 512, 1024, 2048)
    for b in (1, 2, 4)
)
MEMORY = "tp,pp,sp,max_tokens\n1,1,1,1024\n2,1,1,2048\n1,2,1,1024\n4,1,1,4096\n"
TASK = {
    "rank": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "global_batch_size": 12,
    "context_length": 2048,
    "json_key": "text",
    "steps": 5,
    "epochs": 1,
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in ("EXPR_DEPLOY_PATTERN", "EXPR_SCHEME_PROPOSAL", "BUCKET_PLAN"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "time.csv").write_text(TIMES)
    (tmp_path / "memory.csv").write_text(MEMORY)
    tasks = [{**TASK, "dataset_name": "short"}, {**TASK, "dataset_name": "long"}]
    config = {"variant": "canonical", "train_task_num": 2, "task": tasks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lengths = {
        "short": [50 + 3 * i for i in range(100)],
        "long": [300 + 30 * i for i in range(100)],
    }
    (tmp_path / "lengths.json").write_text(json.dumps(lengths))
    return tmp_path


def arguments(*more: str) -> list[str]:
    return [
        *("--model", "tiny", "--num-gpus", "4", "--trainer-config", "config.json"),
        *("--strategy-config", "plan.yaml", "--time-profile", "time.csv"),
        *("--memory-profile", "memory.csv", "--lengths", "lengths.json", "--num-buckets", "6"),
        *more,
    ]


@pytest.mark.parametrize("pattern", ["EXACT", "BALANCE", "GROUP", "PRUNE"])
def test_the_json_is_the_contracts_and_the_plan_file_loads(
    files: Path, capsys: pytest.CaptureFixture[str], pattern: str
) -> None:
    assert main(arguments("--json", "--pattern", pattern, "--time-limit", "5")) == 0
    result = json.loads(capsys.readouterr().out)
    for key in (
        *("plan", "num_gpus", "step_time_s", "gpu_seconds", "lower_bound_s", "gap", "buckets"),
        *("padding_ratio", "planner", "planner_time_s", "homogeneous", "sampled"),
    ):
        assert key in result
    assert set(result["sampled"]) == {
        *("steps", "mean_step_time_s", "mean_gpu_seconds", "lower_bound_s", "gap"),
    }
    assert 0 < result["sampled"]["lower_bound_s"] <= result["sampled"]["mean_step_time_s"]
    assert result["planner"] == pattern
    assert 0 < result["lower_bound_s"] <= result["step_time_s"]
    assert result["gap"] == pytest.approx(1 - result["lower_bound_s"] / result["step_time_s"])
    if pattern == "EXACT":
        assert round(result["step_time_s"], 6) <= result["homogeneous"]["step_time_s"]
    assert set(result["plan"][0]) == {"tp", "pp", "replicas", "max_tokens"}
    plan = load_plan("plan.yaml")
    assert plan.num_gpus == result["num_gpus"] <= 4
    assert plan.meta["model"] == "tiny"
    assert plan.meta["batching"] == ("packed" if pattern == "EXACT" else "bucketed")
    assert (result["buckets"] == []) == (pattern == "EXACT")
    ranks = [rank for replica in plan.meta["ranks"] for stage in replica for rank in stage]
    assert sorted(ranks) == list(range(plan.num_gpus))


def test_the_table_says_what_matters(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--max-seq-length", "1500", "--time-limit", "2")) == 0
    text = capsys.readouterr().out
    for part in ("any other plan", "best homogeneous plan", "are cut to its limit"):
        assert part in text
    assert "certified lower bound" not in text and "--num-buckets: packed" in text
    more = ("--batching", "bucketed", "--verbose", "--time-limit", "2")
    assert main(arguments(*more)) == 0
    text = capsys.readouterr().out
    for part in ("any other plan", "certified lower bound", "expected batch", "gap", "padding"):
        assert part in text
    assert "packed micro-batches have no buckets" not in text


def test_a_dry_run_writes_nothing(files: Path) -> None:
    before = sorted(entry.name for entry in files.iterdir())
    assert main(arguments("--dry-run", "--time-limit", "2")) == 0
    assert sorted(entry.name for entry in files.iterdir()) == before


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("more", "change", "words"),
    [
        (["--num-gpus", "0"], None, "--num-gpus 0: want a positive integer"),
        (["--num-gpus", "-3", "--num-buckets", "0"], None, "2 problems"),
        (["--pattern", "BEST"], None, '"BEST" for --pattern. Choose from: "EXACT"'),
        (["--time-limit", "0"], None, "--time-limit"),
        (["--time-limit", "inf", "--pattern", "GROUP"], None, "--time-limit inf"),
        (["--time-limit", "nan"], None, "--time-limit nan"),
        (["--plot", "a.png"], None, "without --sweep-gpus"),
        (["--plot", "a.xyz", "--sweep-gpus", "1:4"], None, "a .png, .pdf or .svg"),
        (["--strategy-config", "/proc/nope/x.yaml"], None, "/proc/nope/x.yaml cannot be written"),
        (["--strategy-config", "time.csv/x.yaml"], None, "time.csv/x.yaml cannot be written"),
        (
            ["--strategy-config", "time.csv/x.yaml", "--plot", "a.xyz", "--sweep-gpus", "1:4"],
            None,
            "2 problems",
        ),
        (["--bucket-plan", "STATIC", "--batching", "bucketed"], None, "fixed sets"),
        (["--batching", "packed", "--pattern", "PRUNE"], None, "PRUNE plans padded buckets only"),
        (["--batching", "packed", "--cost-model", "lobra6"], None, "LobRA's fit of padded rows"),
        (["--trainer-config", "none"], None, "none"),
        (["--lengths", "none.json"], None, "none.json"),
        (["--model", "600B"], None, "600B"),
        ([], ("lengths.json", '"long": [', '"longer": ['), "no lengths"),
        ([], ("lengths.json", '"long": [300, ', '"long": [0, '), "positive"),
        ([], ("time.csv", "1,128,1,", "1,128,1,nan"), "line 2"),
        ([], ("time.csv", "tp,seq_len", "tp,length"), "column seq_len is missing"),
        ([], ("memory.csv", "2,1,1,2048", "2,1,1,512"), "not monotone"),
        (
            [],
            ("memory.csv", "2,1,1,2048\n1,2,1,1024\n4,1,1,4096\n", "1,2,1,1024\n"),
            "--max-seq-length 1024 (longer sequences are cut), more GPUs (--num-gpus), layers",
        ),
    ],
)
def test_mistakes_end_with_2_and_one_message(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    change: tuple[str, str, str] | None,
    words: str,
) -> None:
    if change is not None:
        edit(files / change[0], change[1], change[2])
    assert main(arguments(*more)) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert not (files / "plan.yaml").exists()


def test_mistakes_of_all_files_are_told_together(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(files / "time.csv", "1,128,1,", "1,128,1,nan")
    edit(files / "memory.csv", "2,1,1,2048", "2,1,1,512")
    edit(files / "lengths.json", '"long": [300, ', '"long": [0, ')
    assert main(arguments("--num-gpus", "0")) == 2
    message = capsys.readouterr().err
    for told in ("4 problems", "--num-gpus 0", "time.csv: line 2", "not monotone", "long[0] = 0"):
        assert told in message


def test_an_empty_task_is_refused(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "lengths.json").write_text('{"short": [], "long": [5, 6]}')
    assert main(arguments()) == 2
    assert "short" in capsys.readouterr().err


def test_lengths_like_the_published_ones_stand_in_for_lobras_data_alone(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in arguments("--json", "--time-limit", "1") if "lengths" not in word]
    config = json.loads((files / "config.json").read_text())
    for task, name in zip(config["task"], ("dolly", "xsum"), strict=True):
        task["dataset_name"] = name
    (files / "config.json").write_text(json.dumps(config))
    assert main([*words, "--max-seq-length", "2048"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("data/ has none of dolly, xsum: lengths are SYNTHETIC" in note for note in notes)
    config["task"][0]["dataset_name"] = "mine"
    (files / "config.json").write_text(json.dumps(config))
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.count("no such data set") == message.count("--lengths published") == 2
    for number, name in enumerate(("mine", "xsum")):
        assert f"config.json: task[{number}].dataset_name = {name!r}: no such data set" in message
    assert main([*words, "--lengths", "published"]) == 2
    assert "no lengths for it (data set 'mine')" in capsys.readouterr().err


def test_a_needed_tp_without_times_is_named(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line for line in TIMES.splitlines(keepends=True) if not line.startswith(("2,", "4,"))]
    (files / "time.csv").write_text("".join(rows))
    assert main(arguments()) == 2
    assert "no rows for tp 2" in capsys.readouterr().err


def test_the_environment_is_read_and_checked(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPR_DEPLOY_PATTERN", "PRUNE")
    monkeypatch.setenv("EXPR_SCHEME_PROPOSAL", "OFF")
    assert main(arguments("--json")) == 0
    assert json.loads(capsys.readouterr().out)["planner"] == "PRUNE"
    monkeypatch.setenv("EXPR_DEPLOY_PATTERN", "FAST")
    monkeypatch.setenv("BUCKET_PLAN", "SOMETIMES")
    assert main(arguments()) == 2
    text = capsys.readouterr().err
    assert "EXPR_DEPLOY_PATTERN=FAST" in text
    assert "BUCKET_PLAN=SOMETIMES" in text


@pytest.mark.parametrize(
    "more", [["--strategy-config", "time.csv/x.yaml"], ["--plot", "time.csv/a.png"]]
)
def test_outputs_are_refused_before_the_search(
    files: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr("lobra.commands.plan.deploy", None)  # a search would fail with 1
    assert main(arguments("--sweep-gpus", "1:4", *more)) == 2


def test_looking_whether_a_file_can_be_written_leaves_nothing(files: Path) -> None:
    before = sorted(files.rglob("*"))
    assert write_problem("--plot", files / "a/b/c.png") is None
    assert "is a folder" in str(write_problem("--plot", files))
    assert sorted(files.rglob("*")) == before


def test_a_huge_time_limit_is_none(files: Path) -> None:
    assert main(arguments("--pattern", "GROUP", "--time-limit", "1e300")) == 0


def test_the_plan_is_there_though_the_picture_fails(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(points: object, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lobra.commands.plan.plot", full)
    more = ("--sweep-gpus", "4:4", "--plot", "a.png", "--pattern", "GROUP")
    assert main(arguments(*more)) == 2
    captured = capsys.readouterr()
    assert "--plot: a.png cannot be written: No space left on device" in captured.err
    assert "Traceback" not in captured.err
    assert load_plan("plan.yaml").num_gpus <= 4


def test_the_json_holds_the_sweep(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--sweep-gpus", "1:4", "--plot", "a.png", "--pattern", "BALANCE", "--json")
    assert main(arguments(*more)) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert [point["gpus_available"] for point in result["sweep"]] == [1, 2, 3, 4]
    none, *others = result["sweep"]
    assert none["plan"] is None
    assert "no layout within 1 GPUs holds the longest bucket" in none["reason"]
    assert "1 GPUs: memory.csv: no layout within 1 GPUs holds" in " ".join(captured.err.split())
    for point in others:
        used = sum(group["tp"] * group["pp"] * group["replicas"] for group in point["plan"])
        assert used == point["num_gpus"] <= point["gpus_available"]
        assert point["gpu_seconds"] == pytest.approx(point["step_time_s"] * used)
        assert 0 < point["lower_bound_s"] <= point["step_time_s"]
    assert (files / "a.png").stat().st_size > 1000


NOTED_PLANNER = """
import pathlib, sys
from lobra.commands.plan import main
from lobra.planner.bucketed.identical import IdenticalModel
solve = IdenticalModel.solve
def noted(self, *arguments):
    pathlib.Path("solving").touch()
    return solve(self, *arguments)
IdenticalModel.solve = noted
sys.exit(main())
"""


def processor_s(pid: int) -> float:
    """Return the processor's seconds a process has used so far (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("pattern", ["BALANCE", pytest.param("PRUNE", marks=pytest.mark.long)])
def test_ctrl_c_ends_the_planners_soon_with_130(files: Path, pattern: str) -> None:
    layouts = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3, 4, 6, 8)]
    rows = "".join(f"{tp},{pp},1,{1024 * tp * (1 + pp // 3)}\n" for tp, pp in layouts)
    (files / "memory.csv").write_text("tp,pp,sp,max_tokens\n" + rows)
    more = ("--num-gpus", "24", "--num-buckets", "16", "--proposal", "off", "--pattern", pattern)
    with subprocess.Popen(
        [sys.executable, "-c", NOTED_PLANNER, *arguments(*more)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as process:
        until = time.monotonic() + 120.0
        while not (files / "solving").exists():
            assert process.poll() is None, "ended before it could be interrupted"
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1.0)
        assert process.poll() is None, "solved before it could be interrupted"
        process.send_signal(signal.SIGINT)
        used_s = processor_s(process.pid)
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 130, errors
    # Of the processor's time, which other work on the machine does not prolong.
    assert usage.ru_utime + usage.ru_stime - used_s < 10.0
    assert "interrupted" in errors and "Traceback" not in errors
    assert not (files / "plan.yaml").exists()


def test_a_plan_that_may_be_meant_is_named(files: Path) -> None:
    (files / "mine.yaml").touch()
    with pytest.raises(ConfigError, match=r"mime.yaml: no such plan \(did you mean 'mine'\?\)"):
        load_plan("mime.yaml")


def test_layouts_left_out_for_the_same_reason_are_told_together() -> None:
    dropped = ["<16,1>: no rows", "<1,32>: needs 32 GPUs: of 16", "<16,2>: no rows"]
    assert by_reason(dropped) == "<16,1> <16,2> (no rows); <1,32> (needs 32 GPUs: of 16)"


def test_all_mistakes_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BUCKET_PLAN", "odd")
    files = "--model tiny --trainer-config nowhere --strategy-config nothing --num-tasks 0"
    for command, told in (
        (f"plan {files} --num-gpus 0 --sweep-gpus x", ["--num-gpus 0", "BUCKET_PLAN=odd", "'x'"]),
        (f"simulate {files} --steps -1", ["--steps -1", "nothing.yaml: no such plan"]),
    ):
        assert lobra(command.split()) == 2
        output = capsys.readouterr().err
        told += ["--num-tasks 0", "'nowhere'", "profile_time_tiny.csv: no such profile"]
        assert all(text in output for text in told), output
        assert f"{len(told)} problems" in output
    words = ["--model", "none", "--trainer-config", "nowhere", "--rows", "-1"]
    assert lobra(["data", "show", *words]) == 2
    assert "3 problems" in capsys.readouterr().err


PLANNING = (
    "--strategy-config", "plan.yaml", "--time-profile", "time.csv", "--lengths", "lengths.json",
    "--memory-profile", "memory.csv",
)  # fmt: skip
ESTIMATING = ("--estimate", "--accelerator", "A100-40GB", "--output", "new.csv")
READERS = (
    ("plan", "--num-gpus", "4", *PLANNING),
    ("simulate", *PLANNING),
    ("profile", "memory", "--num-gpus", "4", *ESTIMATING),
    ("profile", "time", "--tp", "1", *ESTIMATING),
)


@pytest.mark.parametrize("words", READERS, ids=lambda words: "-".join(words[:2]))
def test_what_the_model_cannot_have_is_told_before_training(
    files: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    config = json.loads((files / "config.json").read_text())
    config["task"][0] |= {"modules_to_save": ["input_norm"], "bias": "all"}
    config["task"][1] |= {"rank_pattern": {"k_pro": 2}}
    (files / "config.json").write_text(json.dumps(config))
    (files / "plan.yaml").write_text("strategy_config: [{dp: 1, tp: 1, pp: 1, max_tokens: 2048}]\n")
    before = sorted(entry.name for entry in files.iterdir())
    assert lobra([*words, "--model", "7B", "--trainer-config", "config.json"]) == 2
    message = capsys.readouterr().err
    for told in (
        "3 problems",
        "config.json: task[0].modules_to_save: 'input_norm' fits no norm of 7B",
        "config.json: task[0].bias: all, but 7B has no such biases",
        "config.json: task[1].rank_pattern: 'k_pro' fits nothing that the adapter is on",
    ):
        assert told in message
    assert sorted(entry.name for entry in files.iterdir() if entry.name[0] != ".") == before


@pytest.mark.parametrize("lengths", [["--lengths", "lengths.json"], []])
def test_a_model_that_is_none_is_told_once(
    files: Path, capsys: pytest.CaptureFixture[str], lengths: list[str]
) -> None:
    data = [word for word in arguments() if word not in ("--lengths", "lengths.json")]
    assert main([*data, *lengths, "--model", "70b"]) == 2
    told = "model '70b' (did you mean '70B'?): neither one of"
    assert capsys.readouterr().err.startswith(f"deploy_strategy_plan: {told}")
    assert lobra(["data", "show", "--model", "70b", "--trainer-config", "quickstart"]) == 2
    assert capsys.readouterr().err.startswith(f"lobra: {told}")


def test_predictions_count_the_largest_rank_of_a_task(files: Path) -> None:
    """As a run does, where some linears have another rank."""
    config = json.loads((files / "config.json").read_text())
    options = PlanningOptions(
        model="tiny", trainer_config="config.json", strategy_config="plan.yaml",
        time_profile=Path("time.csv"), lengths=Path("lengths.json"),
    )  # fmt: skip
    found = []
    for change in ({"rank_pattern": {"q_proj": 32}}, {"rank": 32}, {}):
        tasks = [config["task"][0] | change, config["task"][1]]
        (files / "config.json").write_text(json.dumps({**config, "task": tasks}))
        inputs = read_inputs(options, Problems(), with_memory=False)
        found.append(inputs.cost_model.adapter_elements)
    assert found[0] == found[1] > found[2] > 0


def test_lobras_fit_is_of_padded_rows(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--cost-model", "lobra6", "--dry-run", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["batching"] == "bucketed"
