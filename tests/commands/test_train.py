"""What a user does wrong is said at once, with exit code 2, and nothing is written."""

from __future__ import annotations

import fcntl
import json
import platform
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lobra.cli import main
from lobra.common.errors import ConfigError
from lobra.layout.layout import Layout
from lobra.layout.plan import Plan, ReplicaGroup
from lobra.layout.shapes import read_shape
from lobra.model.fingerprint import fingerprint
from lobra.trainer.host_file import read_host_file
from lobra.trainer.launcher import launcher_command
from lobra.trainer.metrics import read_metrics
from lobra.trainer.plan_checks import node_sizes, place_plan
from lobra.trainer.request import TrainRequest
from lobra.trainer.run import host_problems, local_world_size, nodes_of, sourced_environment
from lobra.trainer.run_hosts import RunHosts
from tests.trainer.command import refused, train, write_config, write_plan
from tests.trainer.support import make_plan, make_run, random_dataset, small_task


def test_a_missing_data_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(dataset_name="nowhere")
    assert train(place) == 2
    refused(capsys, "tasks.json: task[0].dataset_name = 'nowhere': no such data set")


def test_a_damaged_row_is_named_with_the_field_that_led_to_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("data/small.jsonl").open("a") as file:
        file.write('{"input_ids": [1, -5]}\n')
    assert train(place) == 2
    refused(
        capsys, "tasks.json: task[0].dataset_name = 'small': data/small.jsonl: line 3: input_ids[1]"
    )


def test_a_command_prints_twenty_lines_of_mistakes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config()
    for name in ("small", "large"):
        Path(f"data/{name}.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
        with Path(f"data/{name}.jsonl").open("a") as file:
            file.write('{"instruction": "a"}\n' * 600 + '{"instruction": 1, "output": "b"}\n')
    config = json.loads(Path("tasks.json").read_text())
    config["task"].append(config["task"][0] | {"dataset_name": "large"})
    config["train_task_num"] = 2
    Path("tasks.json").write_text(json.dumps(config))
    assert train(place, "--num-buckets", "0") == 2
    header, *lines = capsys.readouterr().err.splitlines()
    assert header == "lobra: 1203 problems:"
    assert len(lines) == 20 - 2  # two lines of counts are enough
    for part in ("--num-buckets 0", "data/small.jsonl: line 602", "data/large.jsonl: line 602"):
        assert any(part in line for line in lines), part
    assert lines[15] == "  and 1188 more:"
    assert [line.split(" like: ")[1].split(": line N")[0] for line in lines[16:]] == [
        f"tasks.json: task[N].dataset_name = ...: data/{name}.jsonl" for name in ("small", "large")
    ]


def test_mistakes_in_arguments_environment_and_files_come_together(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DP_BUCKET", "yes")
    write_config(rank=0)
    write_plan({"dp": 0, "tp": 1, "pp": 1, "max_tokens": 64})
    wrong = (
        "--num-buckets", "0", "--keep-checkpoints", "-1", "--revive", "small",
        "--report-to", "wandbx", "--torch-profiler", "5-3",
    )  # fmt: skip
    assert train(place, *wrong) == 2
    refused(
        capsys, "--num-buckets 0", "--keep-checkpoints -1", "DP_BUCKET=yes", "task[0].rank", "dp",
        "--revive: only a run that goes on", "--report-to wandbx", "--torch-profiler 5-3",
    )  # fmt: skip


def test_a_step_to_trace_that_never_comes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "--torch-profiler", "1-9") == 2
    refused(capsys, "--torch-profiler 1-9: the run ends with step 1")


def test_a_plan_that_is_no_yaml_is_said_in_one_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plan.yaml").write_text("strategy_config: [{dp: 1, tp: 1\n")
    assert train(place) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "plan.yaml: line 2, column 1: not valid YAML" in message


def test_the_size_of_a_node_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    request = TrainRequest("m", "t", "s", Path("run"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert node_sizes(request, "cuda") == 4, "this machine's"
    launched = replace(request, found_nodes=(3, 2))
    assert node_sizes(launched, "cuda") == node_sizes(launched, "cpu") == (3, 2)
    assert node_sizes(replace(launched, gpus_per_node=8), "cuda") == 8
    assert node_sizes(request, "cpu") > 1000
    assert nodes_of([3, 3, 3, 2, 2]) == (3, 2)
    assert nodes_of([1, 1]) == (1, 1)
    assert nodes_of([None, 2]) is None
    assert local_world_size({"LOCAL_WORLD_SIZE": "6"}) == 6
    assert local_world_size({"LOCAL_SIZE": "3"}) == 3
    assert local_world_size({}) is None


def test_a_rank_map_for_other_nodes_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    plan = Plan((ReplicaGroup(Layout(4, 1), 2, 64),), {"ranks": [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]})
    request = TrainRequest("m", "t", "plan.yaml", Path("run"), gpus_per_node=4)
    assert place_plan(plan, request, "cuda").replicas[1] == ((4, 5, 6, 7),)
    assert not caplog.records
    plan = Plan((ReplicaGroup(Layout(4, 1), 2, 64),), {"ranks": [[[0, 1, 2, 7]], [[4, 5, 6, 3]]]})
    assert place_plan(plan, request, "cuda").replicas == (((0, 1, 2, 3),), ((4, 5, 6, 7),))
    assert "[0, 1, 2, 7] over nodes of 4 GPUs: the plan is placed anew" in caplog.text
    plan = Plan((ReplicaGroup(Layout(3, 1), 2, 64),), {"ranks": [[[0, 1, 2]], [[3, 4, 5]]]})
    assert place_plan(plan, request, "cuda").replicas == (((0, 1, 2),), ((3, 4, 5),))
    assert "[3, 4, 5] over nodes of 4 GPUs: which is slow; plan for them" in caplog.text


def test_a_sequence_longer_than_any_replica_takes(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan({"dp": 1, "tp": 1, "pp": 1, "max_tokens": 32})
    assert train(place) == 2
    refused(
        capsys, "tasks.json: task[0].context_length = 64: 1 of 2 sequences of task small",
        "longest 40", "max_tokens 32", "lower its context_length to 32", "--max-seq-length",
    )  # fmt: skip


def test_a_sequence_that_just_fits(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 40 tokens; padded, it has 48."""
    write_plan({"dp": 1, "tp": 1, "pp": 1, "max_tokens": 40})
    assert train(place, "--batching", "bucketed") == 2
    refused(capsys, "longest 40 tokens, computed as 48", "lower its context_length to 32")
    assert train(place) == 0


def test_five_mistakes_are_all_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(
        rank=0, lora_alpha="x", target_modules=["z_proj"], global_batch_size=-1, context_length=1.5
    )
    assert train(place) == 2
    refused(
        capsys, "rank", "lora_alpha", "z_proj", "global_batch_size", "context_length", "tasks.json"
    )


def test_mistakes_of_several_files_are_reported_together(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(rank=0)
    write_plan({"dp": 1, "tp": 3, "pp": 9, "max_tokens": 0})
    assert train(place, "--model", "no-such-model") == 2
    refused(capsys, "rank", "max_tokens", "no-such-model")


def test_a_layout_the_model_cannot_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_plan({"dp": 1, "tp": 3, "pp": 1, "max_tokens": 64})
    assert train(place) == 2
    refused(capsys, "<3,1>: tp 3 does not divide the 4 attention heads", "no rows for tp 3")


def test_a_plan_with_more_gpus_than_there_are(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    write_plan({"dp": 4, "tp": 1, "pp": 1, "max_tokens": 64})
    assert train(place, "--device", "cuda") == 2
    refused(capsys, "needs 4 GPUs", "has 1: 3 missing")


def test_no_time_profile(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place, "--time-profile", "missing.csv") == 2
    refused(capsys, "missing.csv: no such profile", "lobra profile time", "--estimate")


def test_damaged_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place, "copy")
    weights = Path("copy/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    assert train(Path("copy")) == 2
    refused(capsys, "copy/model.safetensors: not a usable safetensors file")


def test_weights_of_another_shape(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place, "copy")
    config = json.loads(Path("copy/config.json").read_text())
    Path("copy/config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert train(Path("copy")) == 2
    refused(capsys, "the checkpoint has no tensor 'model.layers.4.self_attn.q_proj.weight'")


def test_an_adapter_to_start_from_that_is_not_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(resume_from="adapters/old")
    assert train(place) == 2
    refused(capsys, "resume_from", "adapter_config.json")


@pytest.mark.parametrize(("name", "value"), [("DP_BUCKET", "yes"), ("EXPR_DATA_DISPATCH", "FAST")])
def test_an_unknown_value_in_the_environment(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    name: str, value: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, value)
    assert train(place) == 2
    refused(capsys, f"{name}={value}")


@pytest.mark.parametrize("option", ["--max-steps", "--num-buckets", "--max-seq-length"])
def test_numbers_that_must_be_positive(
    place: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert train(place, option, "0") == 2
    refused(capsys, f"{option} 0")


def test_a_run_is_never_overwritten(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(place) == 0
    metrics = Path("run/metrics.jsonl").read_text()
    assert train(place) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert Path("run/metrics.jsonl").read_text() == metrics
    assert (Path("run/adapters/small") / "adapter_model.safetensors").is_file()
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    for part in ("small", "validation", "slower replicas", "ended", "done"):
        assert part in shown
    step = json.loads(metrics)
    parts = ("dispatch_wait_s", "prepare_time_s", "replica_wait_s", "reduce_time_s")
    assert all(step[part] >= 0 for part in parts)
    assert step["prepare_time_s"] > 0
    assert step["checkpoint_time_s"] > 0
    assert sum(step[part] for part in parts) < step["step_time_s"]


def test_fp64_is_kept_in_adapters_and_checkpoints(place: Path) -> None:
    write_config(steps=2)
    assert train(place, "--precision", "fp64", "--max-steps", "1") == 0
    assert train(place, "--precision", "fp64", "--resume", "--max-steps", "2") == 0
    for path in (
        "run/adapters/small/adapter_model.safetensors",
        "run/checkpoints/step_1/adapters/small/adapter_model.safetensors",
        "run/checkpoints/step_2/moments/small.safetensors",
    ):
        values = load_file(path).values()
        assert {value.dtype for value in values} == {torch.float64}, path
        exact = [bool((value != value.float().double()).any()) for value in values]
        assert any(exact), f"{path}: fp32 values in fp64"


def test_a_run_goes_on_with_another_plan_and_is_reported(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(steps=3)
    assert train(place, "--max-steps", "1") == 0
    write_plan({"dp": 2, "tp": 1, "pp": 1, "max_tokens": 64})
    assert train(place, "--resume", "--max-steps", "3") == 0
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["replicas"]) for line in lines] == [1, 2, 2]
    assert [json.loads(line)["plan_from"] for line in lines] == [0, 1, 1]
    plans = yaml.safe_load(Path("run/config.yaml").read_text())["plans"]
    assert [(entry["from_step"], entry["plan"][0]["dp"]) for entry in plans] == [(0, 1), (1, 2)]
    assert [entry["rank_map"] for entry in plans] == [[[[0]]], [[[0]], [[1]]]]
    capsys.readouterr()
    assert main(["report", "run", "--plots", "--trace"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "plan 1, step 1 ", "<1,1>x1 on 1 CPU rank", "plan 2, steps 2-3 ", "<1,1>x2 on 2 CPU ranks",
        "Replicas of <1,1>x1, step 1", "Replicas of <1,1>x2, steps 2-3",
    ):  # fmt: skip
        assert part in shown
    assert {"losses.png", "step_time.png", "replicas.png", "timeline.png"} == {
        path.name for path in Path("run/report").iterdir()
    }
    events = json.loads(Path("run/trace.json").read_text())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["name"]) for e in slices] == [
        (0, 0, "step 0"), (1, 0, "step 1"), (1, 0, "step 2"), (2, 0, "step 1"), (2, 0, "step 2")
    ]  # fmt: skip
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "plan 1: <1,1>x1, step 1: replica 0 <1,1>",
        "plan 2: <1,1>x2, steps 2-3: replica 0 <1,1>",
        "plan 2: <1,1>x2, steps 2-3: replica 1 <1,1>",
    ]
    assert train(place, "--resume", "7") == 2
    assert "has only the steps 1, 3" in capsys.readouterr().err
    write_config(steps=3, name="another")
    assert train(place, "--resume") == 2
    told = capsys.readouterr().err
    assert told.startswith(
        "lobra: --resume: tasks.json has other tasks than the checkpoint: it lacks"
    )


@pytest.mark.parametrize(
    ("option", "memory"),
    [(("--memory", "lean"), "lean"), (("--gradient-checkpointing",), "full")],
)
def test_a_memory_policy_for_the_whole_run(
    place: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], memory: str
) -> None:
    write_config(steps=2)
    assert train(place, *option, "--max-steps", "1") == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["plan"] == [{"dp": 1, "tp": 1, "pp": 1, "memory": memory, "max_tokens": 64}]
    assert main(["report", "run"]) == 0
    assert f"<1,1>x1 {memory} on 1 CPU rank" in capsys.readouterr().out
    assert train(place, "--resume") == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["plan"] == [{"dp": 1, "tp": 1, "pp": 1, "max_tokens": 64}]


def test_two_runs_never_share_a_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    with Path("run/.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert train(place) == 2
    assert "another run is writing" in capsys.readouterr().err
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_a_run_that_died_before_its_first_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text('{"step": 0}\n')
    assert train(place) == 2
    assert "holds a run without a checkpoint" in capsys.readouterr().err
    Path("run/metrics.jsonl").write_text("")
    Path("run/checkpoints/.step_1.partial").mkdir(parents=True)
    assert train(place) == 0
    assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step_1"]


def test_a_prediction_that_is_far_off_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(place) == 0
    (step,) = read_metrics(Path("run"))
    for predicted_s, num_steps, said in [
        (3.0, 5, "3.0 times less than predicted"), (0.25, 5, "4.0 times longer"),
        (0.6, 5, None), (1.9, 5, None), (3.0, 4, None),
    ]:  # fmt: skip
        step |= {"step_time_s": 1.0, "predicted_step_time_s": predicted_s}
        lines = (json.dumps({**step, "step": number}) + "\n" for number in range(num_steps))
        Path("run/metrics.jsonl").write_text("".join(lines))
        capsys.readouterr()
        assert main(["report", "run"]) == 0
        shown = capsys.readouterr().out
        assert ("does not fit this machine" in shown) == (said is not None)
        assert said is None or said in shown


def test_a_plan_for_more_gpus_than_were_given(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_plan({"dp": 4, "tp": 1, "pp": 1, "max_tokens": 64})
    assert train(place, "--num-gpus", "2") == 2
    refused(capsys, "needs 4 ranks, but only 2 GPUs may be used")


def test_report_of_a_folder_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "none of config.yaml (a run)" in capsys.readouterr().err


def test_host_files(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nalpha slots=8\nbeta slots=4 # half\n\n")
    assert read_host_file(path) == {"alpha": 8, "beta": 4}
    command = launcher_command(["--model", "7B"], RunHosts.read(path, 0.0), 12, "10.0.0.1", 29500)
    assert command[command.index("--hostfile") + 1] == str(path)
    assert "--include" not in command
    fewer = launcher_command([], RunHosts.read(path, 0.0), 10, None, None)
    assert fewer[fewer.index("--include") + 1] == "alpha:0,1,2,3,4,5,6,7@beta:0,1"
    assert not {"--no_ssh_check", "--force_multi"} & {*command, *fewer}
    assert command[command.index("--master_addr") + 1] == "10.0.0.1"
    assert command[-4:] == ["lobra.cli", "train", "--model", "7B"]
    with pytest.raises(ConfigError, match="12 slots on 2 hosts, the plan needs 16"):
        launcher_command([], RunHosts.read(path, 0.0), 16, None, None)
    path.write_text("alpha\nbeta slots=x\nbeta slots=1\nbeta slots=2\ngamma 8\n")
    with pytest.raises(ConfigError) as caught:
        read_host_file(path)
    assert len(caught.value.problems) == 4


def test_a_host_file_of_one_host(tmp_path: Path) -> None:
    """This machine needs no ssh; another one is started there, not here."""
    path = tmp_path / "hosts"
    for name in ("localhost", "127.0.0.1", platform.node()):
        path.write_text(f"{name} slots=2\nother.invalid slots=2\n")
        here = launcher_command([], RunHosts.read(path, 0.0), 2, None, 29500)
        assert "--no_ssh_check" in here
        assert here[here.index("--master_addr") + 1] == "127.0.0.1"
    assert "10.0.0.1" in launcher_command([], RunHosts.read(path, 0.0), 2, "10.0.0.1", 29500)
    path.write_text("other.invalid slots=2\n")
    there = launcher_command([], RunHosts.read(path, 0.0), 2, None, None)
    assert "--force_multi" in there
    assert not {"--no_ssh_check", "--master_addr"} & {*there}


def test_an_environment_file_is_sourced(tmp_path: Path) -> None:
    path = tmp_path / "env.sh"
    path.write_text("LOBRA_TEST_VALUE=$((40 + 2))\necho noise\n")
    assert sourced_environment(path)["LOBRA_TEST_VALUE"] == "42"
    path.write_text("exit 3\n")
    with pytest.raises(ConfigError, match="exit code 3"):
        sourced_environment(path)
    with pytest.raises(ConfigError, match="no such file"):
        sourced_environment(tmp_path / "none")


def test_a_host_without_what_its_ranks_read(tmp_path: Path, tiny_base: Path) -> None:
    """Under a launcher every host reads the base itself; adapters it gets from rank 0."""
    task = small_task(resume_from=str(tmp_path / "start"))
    known = fingerprint(tiny_base, read_shape(tiny_base))
    plan, data = make_plan([(1, 1)], 64), random_dataset(4, 3, 8, 64, 0)
    run = make_run(tmp_path / "run", tiny_base, (task,), [data], plan, 1, fingerprint=known)
    here = platform.node()
    assert host_problems(run) == []
    (said,) = host_problems(replace(run, model_folder=tmp_path / "gone"))
    assert said.startswith(f"{tmp_path}/gone: not on host {here}; ")
    (said,) = host_problems(replace(run, fingerprint="tensors:0"))
    assert f"another model on host {here} than on that of rank 0; copy it anew" in said


@pytest.mark.parametrize(
    "option", [["--memory", "full"], ["--memory=full"], ["--gradient-checkpointing"]]
)
def test_a_plan_made_anew_says_itself_what_is_kept(
    place: Path, option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranks of a host file end for another plan; what the command kept was of the first."""
    write_config()
    Path("hosts").write_text("localhost slots=4\n")
    words = ["--model", str(place), "--trainer-config", "tasks.json", "--strategy-config"]
    words += ["plan.yaml", *option, "--output-dir", "run", "--host-file", "hosts"]
    launched: list[list[str]] = []

    def launch(command: list[str]) -> int:
        launched.append(command[command.index("train") + 1 :])
        if len(launched) == 1:
            for file in ("run/plans/step_6.yaml", "run/checkpoints/step_6/state.json"):
                Path(file).parent.mkdir(parents=True)
                shutil.copy("plan.yaml", file)
        return 0

    monkeypatch.setattr("lobra.commands.train.run_launcher", launch)
    monkeypatch.setattr("sys.argv", ["lobra", "train", *words])
    assert main(["train", *words]) == 0
    kept = [word for word in words if word not in option]
    again = ["--strategy-config", "run/plans/step_6.yaml", "--resume", "6"]
    assert launched == [words, [*kept, *again]]


def test_ranks_are_started_on_the_hosts_that_are_left(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a plan for them, which is told to plan for no more; with all, once all are back."""
    write_config()
    write_plan({"dp": 4, "tp": 1, "pp": 1, "max_tokens": 64})
    Path("hosts").write_text("localhost slots=2\nb.invalid slots=2\n")
    words = ["--model", str(place), "--trainer-config", "tasks.json", "--strategy-config"]
    words += ["plan.yaml", "--output-dir", "run", "--host-file", "hosts", "--replan", "auto"]
    words += ["--max-restarts", "2", "--await-hosts", "0"]
    launched: list[list[str]] = []

    def launch(command: list[str]) -> int:
        launched.append(command)
        return [1, 1, 0][len(launched) - 1]

    def planned(
        request: TrainRequest, present: Plan, ranks: dict[str, int], left: dict[str, int], why: str
    ) -> Path:
        assert request.num_gpus == 4
        assert sum(ranks.values()) == present.num_gpus == 4 - 2 * (len(launched) - 1)
        assert why == f"host b.invalid (2 GPUs) is {'lost' if len(left) == 1 else 'back'}"
        write_plan({"dp": sum(left.values()), "tp": 1, "pp": 1, "max_tokens": 64})
        return Path("plan.yaml").rename(f"plan-{len(left)}.yaml")

    monkeypatch.setattr("lobra.trainer.restarts.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("lobra.trainer.run_hosts.why_silent", lambda _name: None)
    monkeypatch.setattr("lobra.trainer.run_hosts.answers", lambda _name: len(launched) == 2)
    monkeypatch.setattr("lobra.trainer.survivors.plan_on_hosts", planned)
    monkeypatch.setattr("lobra.commands.train.run_launcher", launch)
    monkeypatch.setattr("sys.argv", ["lobra", "train", *words])
    assert main(["train", *words]) == 0
    given, smaller, whole = (command[command.index("train") + 1 :] for command in launched)
    assert given == words
    assert smaller == [*words, "--strategy-config", "plan-1.yaml", "--num-gpus", "2"]
    assert whole == [*words, "--strategy-config", "plan-2.yaml"]
    assert ["localhost:0,1" in command for command in launched] == [False, True, False]


def test_hosts_that_are_mistyped_are_told_before_anything_is_started(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config()
    write_plan({"dp": 2, "tp": 1, "pp": 1, "max_tokens": 64})
    Path("hosts").write_text("a.invalid slots=1\nb.invalid slots=1\n")
    words = ["--model", str(place), "--trainer-config", "tasks.json", "--strategy-config"]
    words += ["plan.yaml", "--output-dir", "run", "--host-file", "hosts", "--max-restarts", "2"]
    monkeypatch.setattr("lobra.commands.train.run_launcher", pytest.fail)
    monkeypatch.setattr("lobra.trainer.run_hosts.why_silent", lambda _name: "unknown")
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert all(f"hosts: host {name} does not answer" in said for name in ("a.invalid", "b.invalid"))
    assert not Path("run").exists()
