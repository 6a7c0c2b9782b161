"""Ten steps are five and a resume and five: bit for bit on the same plan, 1e-9 on another.

Plans round differently, and Adam makes much of it where a gradient vanishes: what is compared
between two plans is trained in fp64.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lobra.common.errors import ConfigError
from lobra.layout.placement import place
from lobra.layout.plan import Plan
from lobra.tasks.config import TaskConfig
from lobra.tasks.target_modules import TARGET_MODULES
from lobra.trainer.adapters import adapter_spec, save_adapter
from lobra.trainer.checkpoint import (
    CheckpointState,
    CheckpointWriter,
    drop_later,
    newest_whole,
    read_state,
)
from lobra.trainer.checkpoint_folder import list_checkpoints, step_folder
from lobra.trainer.metrics import read_metrics, restore_metrics
from lobra.trainer.resume_checks import (
    resume_problems,
    revival_problems,
    revivals_in_vain,
    task_record,
)
from lobra.trainer.run import run_local
from lobra.trainer.run_spec import RunSpec
from lobra.trainer.task_progress import TaskProgress
from lobra.trainer.trained_tasks import last_step
from lobra.trainer.zero import moment_names
from tests.trainer.support import make_plan, make_run, random_dataset, train_steps

COMMON = dict(dataset_name="random", context_length=64, learning_rate=1e-2)
TASKS = (
    TaskConfig(
        "one", 4, 8.0, TARGET_MODULES, 4, lr_scheduler="cosine", warmup_steps=3, steps=10,
        weight_decay=0.05, **COMMON,
    ),
    TaskConfig("two", 2, 4.0, ("q_proj", "down_proj"), 3, max_grad_norm=0.1, steps=10, **COMMON),
    TaskConfig("short", 2, 4.0, ("o_proj",), 2, steps=4, **COMMON),
)  # fmt: skip
PLAN = make_plan([(1, 1), (2, 1), (1, 2)], max_tokens=64)


def new_run(folder: Path, base: Path, steps: int) -> RunSpec:
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(3)]
    return make_run(folder, base, TASKS, data, PLAN, steps, precision="fp64")


def adapters(run: RunSpec) -> dict[str, torch.Tensor]:
    return {
        f"{task.name}.{name}": value
        for number, task in enumerate(run.tasks)
        for name, value in load_file(
            run.adapter_folder(number) / "adapter_model.safetensors"
        ).items()
    }


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    run = new_run(tmp_path_factory.mktemp("straight") / "run", base, 10)
    run_local(run)
    return adapters(run)


@pytest.fixture(scope="module")
def half(base: Path, tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    run = new_run(tmp_path_factory.mktemp("half") / "run", base, 5)
    run_local(run)
    assert list_checkpoints(run.output_dir) == [5]
    return run


PLANS = {
    "same": PLAN,
    "fewer ranks": make_plan([(1, 1)], 64),
    "more ranks": make_plan([(2, 2), (1, 1), (1, 1)], 64),
}


def test_a_bucketed_run_goes_on_packed(
    base: Path, straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    half = replace(new_run(tmp_path / "run", base, 5), batching="bucketed")
    run_local(half)
    assert read_state(half.output_dir, 5).batching == "bucketed"
    run = replace(half, batching="packed", last_step=10, resume_step=5)
    run_local(run)
    for key, value in adapters(run).items():
        error = float((value - straight[key]).norm() / straight[key].norm())
        assert error < 1e-9, f"{key}: relative error {error:.1e}"


@pytest.mark.parametrize("name", PLANS)
def test_resume(
    name: str, base: Path, half: RunSpec, straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    plan: Plan = PLANS[name]
    run = replace(
        half, output_dir=half.output_dir, last_step=10, resume_step=5, plan=plan,
        world=place(plan, 1 << 20),
    )  # fmt: skip
    assert [step.step for step in train_steps(run)] == [5, 6, 7, 8, 9]
    resumed = adapters(run)
    assert resumed.keys() == straight.keys()
    for key, expected in straight.items():
        if name == "same":
            assert torch.equal(resumed[key], expected), f"{key} differs"
        else:
            error = float((resumed[key] - expected).norm() / expected.norm())
            assert error < 1e-9, f"{key}: relative error {error:.1e}"


def eventful_run(
    folder: Path, base: Path, steps: int, layouts: tuple = ((1, 1), (2, 1)), **changes: object
) -> RunSpec:
    """Dropout on one task, validation of all, and one that is stopped on a plateau at step 4."""
    tasks = (
        replace(TASKS[0], lora_dropout=0.3),
        TASKS[1],
        replace(TASKS[2], steps=8, early_stopping_patience=1, early_stopping_min_delta=50.0),
    )
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(3)]
    plan = make_plan(list(layouts), 64)
    run = make_run(
        folder, base, tasks, data, plan, steps, num_steps=(8, 8, 8), validate_every=2, **changes
    )
    for task, held_out in enumerate(data[:2]):
        held_out.save(run.validation_folder(task))
    return run


@pytest.mark.long
def test_resume_in_the_middle_of_events(base: Path, tmp_path: Path) -> None:
    """Three steps are in the middle of a period; the plateau is seen after the resume. In fp32."""
    straight = eventful_run(tmp_path / "straight", base, 8)
    expected = train_steps(straight)
    run_local(eventful_run(tmp_path / "parts", base, 3))
    rest = eventful_run(tmp_path / "parts", base, 8, resume_step=3)
    resumed = train_steps(rest)
    assert ["short" in step.tasks for step in expected] == [True] * 4 + [False] * 4
    for ours, theirs in zip(resumed, expected[3:], strict=True):
        assert ours.tasks == theirs.tasks, "losses, norms, rates, validation"
    both = adapters(rest), adapters(straight)
    assert all(torch.equal(both[0][key], value) for key, value in both[1].items())


def test_a_stopped_task_is_revived_when_asked(base: Path, tmp_path: Path) -> None:
    one = dict(layouts=((1, 1),))
    run_local(eventful_run(tmp_path / "run", base, 5, **one))
    stopped = eventful_run(tmp_path / "run", base, 6, resume_step=5, **one)
    assert "short" not in train_steps(stopped)[0].tasks
    revived = eventful_run(tmp_path / "run", base, 8, resume_step=6, revive=("short",), **one)
    steps = train_steps(revived)
    assert ["short" in step.tasks for step in steps] == [True, True]
    saved = read_state(tmp_path / "run", 5)
    assert revival_problems(saved, ["short"]) == []
    problems = "\n".join(revival_problems(saved, ["one", "nobody"]))
    assert "--revive one: this task is not stopped; stopped are short" in problems
    assert "--revive nobody: the checkpoint has no such task; it has one, two, short" in problems


def test_a_task_whose_steps_are_over_is_not_revived() -> None:
    progress = {"one": TaskProgress(12, steps=8), "short": TaskProgress(5, 5, stopped="a plateau")}
    saved = replace(state(8), progress=progress)
    over = "--revive short: its 5 steps are over; raise its steps"
    assert revivals_in_vain(saved, ["short"], {"one": 12, "short": 5}) == [over]
    assert revivals_in_vain(saved, ["short"], {"one": 12, "short": 6}) == []
    assert revivals_in_vain(saved, [], {"one": 12, "short": 5}) == []


def test_a_run_ends_when_every_task_has_made_its_own_steps() -> None:
    steps = {"one": 12, "late": 9, "short": 9}
    assert last_step(None, (), steps, None) == 12
    assert last_step(None, (), steps, 7) == 7
    progress = {
        "one": TaskProgress(12, steps=11), "late": TaskProgress(9, steps=6),
        "short": TaskProgress(9, steps=4, stopped="a plateau"),
    }  # fmt: skip
    saved = replace(state(11), progress=progress)
    assert last_step(saved, (), steps, None) == 11 + 3
    assert last_step(saved, ("short",), steps, None) == 11 + 5
    assert last_step(saved, (), dict.fromkeys(steps, 4), None) == 11, "all have made theirs"


def test_resume_with_the_tasks_in_another_order_and_one_given_more_steps(
    base: Path, half: RunSpec, straight: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Tasks are known by name; one that had ended goes on from its own last step."""
    longer = replace(TASKS[2], steps=9)
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(3)]
    alone = make_run(
        tmp_path / "alone", base, (longer,), data[2:], make_plan([(1, 1)], 64), 9, precision="fp64"
    )
    run_local(alone)
    expected = {key: v for key, v in straight.items() if not key.startswith("short.")}
    expected |= adapters(alone)
    run = replace(
        half, tasks=(longer, *TASKS[:2]), num_steps=(9, 10, 10), last_step=10, resume_step=5
    )
    steps = train_steps(run)
    assert [step.tasks["short"].own_step for step in steps] == [4, 5, 6, 7, 8]
    resumed = adapters(run)
    assert resumed.keys() == expected.keys()
    for key, value in expected.items():
        error = float((resumed[key] - value).norm() / value.norm())
        assert error < 1e-9, f"{key}: relative error {error:.1e}"


@pytest.mark.long
def test_resume_with_feedback(base: Path, tmp_path: Path) -> None:
    """Timings decide who computes what, so sums round differently; the factors go on."""
    plan = make_plan([(1, 1), (1, 1)], 64)
    data = [random_dataset(15, 6, 50, 256, seed) for seed in range(3)]

    def part(name: str, steps: int, **changes: object) -> RunSpec:
        return make_run(
            tmp_path / name, base, TASKS, data, plan, steps, feedback=True, num_steps=(6, 6, 4),
            precision="fp64", **changes,
        )  # fmt: skip

    straight, half = part("straight", 6), part("parts", 3)
    run_local(straight)
    run_local(half)
    saved = read_state(half.output_dir, 3)
    rest = part("parts", 6, resume_step=3)
    steps = train_steps(rest)
    assert [replica.speed_factor for replica in steps[0].replicas] == pytest.approx(
        saved.speed_factors
    )
    # The first step after a start is never learnt from.
    assert read_state(rest.output_dir, 6).speed_counts == [n + 2 for n in saved.speed_counts]
    both = adapters(rest), adapters(straight)
    for key, expected in both[1].items():
        error = float((both[0][key] - expected).norm() / expected.norm())
        assert error < 1e-9, f"{key}: relative error {error:.1e}"


def test_a_checkpoint_is_a_set_of_peft_adapters(half: RunSpec) -> None:
    folder = step_folder(half.output_dir, 5)
    for number, task in enumerate(half.tasks):
        saved = load_file(folder / "adapters" / task.name / "adapter_model.safetensors")
        final = load_file(half.adapter_folder(number) / "adapter_model.safetensors")
        assert saved.keys() == final.keys()
    assert json.loads((folder / "state.json").read_text())["step"] == 5


def state(step: int) -> CheckpointState:
    return CheckpointState(step, 0, [], {}, [], [], "plan", "base")


def state_of(step: int, *names: str) -> CheckpointState:
    progress = {name: TaskProgress(step, step) for name in names}
    return replace(state(step), tasks=[{"name": name} for name in names], progress=progress)


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    spec = adapter_spec(TASKS[2])
    for step in (2, 4, 6, 10):
        writer = CheckpointWriter(tmp_path, step)
        writer.add_task(spec, {"w": torch.ones(2)}, {"exp_avg": {"w": torch.ones(2)}}, "base")
        assert step not in list_checkpoints(tmp_path), "visible before it is complete"
        writer.finish(state(step), num_kept=2)
    assert list_checkpoints(tmp_path) == [6, 10]
    assert read_state(tmp_path, None).step == 10
    assert read_state(tmp_path, 6).step == 6
    drop_later(tmp_path, 10)
    assert list_checkpoints(tmp_path) == [6, 10]
    with pytest.raises(ConfigError, match="only the steps 6, 10"):
        read_state(tmp_path, 7)
    (step_folder(tmp_path, 10) / "state.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a usable checkpoint"):
        read_state(tmp_path, 10)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        read_state(tmp_path / "elsewhere", None)


@pytest.fixture
def three_steps(tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of one task at 2, 4 and 6."""
    spec = adapter_spec(TASKS[2])
    for step in (2, 4, 6):
        writer = CheckpointWriter(tmp_path, step)
        moments = {kind: {"w": torch.ones(2)} for kind in moment_names("adamw", 0.0)}
        writer.add_task(spec, {"w": torch.ones(2)}, moments, "base")
        writer.finish(state_of(step, spec.name), num_kept=3)
    return tmp_path


def test_an_interrupted_removal_leaves_whole_checkpoints(
    three_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "state.json").rename(folder / "half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lobra.common.files.shutil.rmtree", interrupted)
        drop_later(three_steps, 2)
    assert list_checkpoints(three_steps) == [2, 4]
    assert read_state(three_steps, None).step == 4
    drop_later(three_steps, 2)
    CheckpointWriter(three_steps, 4).finish(state(4), num_kept=1)
    assert [path.name for path in (three_steps / "checkpoints").iterdir()] == ["step_4"]


@pytest.mark.parametrize(
    "name", ["adapters/{}/adapter_model.safetensors", "moments/{}.safetensors"]
)
def test_a_checkpoint_without_a_task_s_files_is_not_resumed(three_steps: Path, name: str) -> None:
    name = name.format(TASKS[2].name)
    (step_folder(three_steps, 6) / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} is missing; .* --resume 4$"):
        read_state(three_steps, None)
    assert read_state(three_steps, 4).step == 4
    for step in (2, 4):
        (step_folder(three_steps, step) / name).unlink()
    with pytest.raises(ConfigError, match="none is complete"):
        read_state(three_steps, 2)


FILES = ["adapters/{}/adapter_model.safetensors", "moments/{}.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_names_the_last_whole_one(three_steps: Path, name: str) -> None:
    name = name.format(TASKS[2].name)
    for step in (4, 6):
        path = step_folder(three_steps, step) / name
        path.write_bytes(path.read_bytes()[:-3])
    for step in (None, 4):
        with pytest.raises(ConfigError, match=rf"{name} is .*; .* --resume 2$"):
            read_state(three_steps, step)
    assert read_state(three_steps, 2).step == 2


@pytest.mark.parametrize("name", [*FILES, "adapters/{}/adapter_config.json"])
def test_one_flipped_bit_is_found(three_steps: Path, name: str) -> None:
    name = name.format(TASKS[2].name)
    path = step_folder(three_steps, 6) / name
    content = bytearray(path.read_bytes())
    # Of a tensor file the last value, of a JSON file a digit (of the seed; of the rank).
    place = content.rindex(b": 0,") + 2 if name == "state.json" else -1
    place = content.index(b'"r": 2') + 5 if name.endswith("_config.json") else place
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name} is damaged .*SHA-256.* --resume 4$"):
        read_state(three_steps, None)
    assert newest_whole(three_steps)[0] == 4
    (why,) = newest_whole(three_steps)[1]
    assert f"step_6: {name} is damaged" in why


def unsealed(folder: Path) -> None:
    """Make a checkpoint one of format 2."""
    state = json.loads((folder / "state.json").read_text())
    del state["seal"]
    (folder / "state.json").write_text(json.dumps({**state, "format": 2}))


@pytest.mark.parametrize("kind", ["adapters/{}/adapter_model", "moments/{}"])
def test_values_that_are_not_finite_are_damage_unless_they_were_saved_so(
    three_steps: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = adapter_spec(TASKS[2])
    unsealed(step_folder(three_steps, 6))
    assert read_state(three_steps, 6).step == 6, "a checkpoint of an older version"
    path = step_folder(three_steps, 6) / f"{kind.format(spec.name)}.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.tensor([1.0, math.nan])}, path)
    with pytest.raises(ConfigError, match=rf"not finite \({name}\); .* --resume 4$"):
        read_state(three_steps, 6)
    writer = CheckpointWriter(three_steps, 8)
    moments = {kind: {"w": torch.ones(2)} for kind in ("exp_avg", "exp_avg_sq")}
    writer.add_task(spec, {"w": torch.full((2,), math.nan)}, moments, "base")
    writer.finish(state_of(8, spec.name), num_kept=3)
    assert read_state(three_steps, 8).step == 8
    assert "not finite (w), as it was saved" in caplog.text


def test_what_is_wrong_with_a_state_is_said(three_steps: Path) -> None:
    path = step_folder(three_steps, 6) / "state.json"
    changes = {"step": "six", "speed_factors": [0.0], "data_day": "today", "spped_counts": []}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError) as caught:
        read_state(three_steps, None)
    for part in (
        'step = "six": want an integer of 0 or more',
        "speed_factors[0] = 0.0: want a positive number",
        "data_day: Invalid isoformat string",
        "spped_counts: is no field here (did you mean 'speed_counts'?)",
    ):
        assert part in str(caught.value)


def test_moments_that_do_not_fit_the_adapter_are_refused(three_steps: Path) -> None:
    moments = step_folder(three_steps, 6) / "moments" / f"{TASKS[2].name}.safetensors"
    whole = load_file(moments)
    for change in ({"exp_avg/w": torch.ones(3)}, {"exp_avg/v": torch.ones(2)}):
        save_file({**whole, **change}, moments)
        with pytest.raises(ConfigError, match="does not fit .* --resume 4$"):
            read_state(three_steps, None)


def test_the_step_before_a_checkpoint_is_never_lost(base: Path, tmp_path: Path) -> None:
    """As after a kill between the checkpoint and its step's line: the line is missing."""
    data = [random_dataset(15, 6, 50, 256, 0)]
    first = make_run(tmp_path, base, TASKS[:1], data, make_plan([(1, 1)], 64), 2)
    run_local(first)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    run_local(replace(first, last_step=3, resume_step=2))
    steps = read_metrics(tmp_path)
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert steps[1] == {**json.loads(lines[1]), "checkpoint_time_s": 0.0}
    restore_metrics(tmp_path, 1, steps[0])
    assert read_metrics(tmp_path) == steps[:1]


def test_what_may_not_change_is_named() -> None:
    data = random_dataset(5, 6, 20, 256, 0)
    before = [task_record(task, data) for task in TASKS]
    saved = replace(state_of(5, *(task.name for task in TASKS)), tasks=before)
    assert resume_problems(saved, before, 0, "base", "tasks.json") == []
    assert resume_problems(saved, before[::-1], 0, "base", "tasks.json") == []
    other = random_dataset(5, 6, 20, 256, 1)
    changed = [task_record(replace(TASKS[0], rank=8), other), *before[1:]]
    problems = "\n".join(resume_problems(saved, changed, 0, "x", "tasks.json"))
    for part in (
        "not the base model",
        "task one: rank is 8",
        "task one: its data set 'random' is not what the checkpoint was trained on",
    ):
        assert part in problems
    (seed,) = resume_problems(saved, before, 3, "base", "tasks.json")
    assert "--seed 0, not 3" in seed
    (problem,) = resume_problems(
        saved, [{**before[0], "name": "new"}, *before[1:]], 1, "x", "f.json"
    )
    assert "f.json has other tasks than the checkpoint: it lacks one and has besides new" in problem


def test_saving_over_a_half_written_adapter(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "rubbish").write_text("left by a crash")
    save_adapter(tmp_path / "a", adapter_spec(TASKS[2]), {"w": torch.ones(1)}, "base")
    assert not (tmp_path / "a" / "rubbish").exists()
