from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lobra.common.errors import ConfigError
from lobra.tasks import foreign_names
from lobra.tasks.config import TaskConfig
from lobra.tasks.lengths import load_lengths
from lobra.tasks.target_modules import (
    ADAPTED_MODULES,
    MODULE_ALIASES,
    TARGET_MODULES,
    resolve_target_modules,
)
from lobra.tasks.task_file import load_trainer_config

LOBRA_TASK = {
    "rank": 16,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "dense_h_to_4h", "dense_4h_to_h"],
    "global_batch_size": 256,
    "dataset_name": "dolly",
    "context_length": 8192,
    "json_key": "text",
    "steps": 21,
    "epochs": 1,
}


def write(folder: Path, tasks: list[Any], name: str = "c.json", **fields: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"variant": "canonical", "task": tasks, **fields}))
    return path


def problems_of(path: Path, **arguments: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_trainer_config(path, **arguments)
    assert all(problem.startswith(str(path)) for problem in caught.value.problems)
    return tuple(problem.removeprefix(f"{path}: ") for problem in caught.value.problems)


def test_lobras_file_loads_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path, [LOBRA_TASK], train_task_num=1)
    config = load_trainer_config(path)
    (task,) = config.tasks
    assert (config.name, config.variant, config.path) == ("c", "canonical", path)
    assert (task.name, task.dataset_name) == ("dolly", "dolly")
    assert (task.rank, task.lora_alpha, task.global_batch_size) == (16, 16, 256)
    assert (task.context_length, task.json_key, task.steps, task.epochs) == (8192, "text", 21, 1)
    assert task.target_modules == TARGET_MODULES


def test_lobras_fused_modules_are_the_same_projections(tmp_path: Path) -> None:
    fused = LOBRA_TASK | {"target_modules": ["qkv_proj", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
    config = load_trainer_config(write(tmp_path, [fused], variant="fused"))
    assert config.variant == "fused" and config.tasks[0].target_modules == TARGET_MODULES


def test_yaml_says_the_same_as_json(tmp_path: Path) -> None:
    document = {"task": [LOBRA_TASK, LOBRA_TASK | {"learning_rate": 2e-4, "prompt": "plain"}]}
    as_json = tmp_path / "c.json"
    as_json.write_text(json.dumps(document))
    as_yaml = tmp_path / "c.yaml"
    as_yaml.write_text(yaml.safe_dump(document))
    assert load_trainer_config(as_json).tasks == load_trainer_config(as_yaml).tasks


def test_every_optional_field_reaches_the_task(tmp_path: Path) -> None:
    options = {
        "name": "mine",
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler": "cosine",
        "warmup_steps": 3,
        "max_grad_norm": 0,
        "lora_dropout": 0.05,
        "seed": 5,
        "prompt": "{instruction} -> {output}",
        "train_on_inputs": True,
        "validation_split": 0.1,
        "resume_from": "adapters/old",
        "max_samples": 100,
        "adapter": "rslora",
        "rank_pattern": {"q_proj": 4},
        "alpha_pattern": {"q_proj": 4.0},
        "optimizer": "sgd",
        "momentum": 0.9,
        "loraplus_ratio": 4.0,
        "modules_to_save": ("norm",),
    }
    (task,) = load_trainer_config(write(tmp_path, [LOBRA_TASK | options])).tasks
    assert {field: getattr(task, field) for field in options} == options


@pytest.mark.parametrize("value", ["all-linear", ["all-linear"], ["v_proj", "all-linear"]])
def test_all_linears_as_peft_spells_them(tmp_path: Path, value: Any) -> None:
    (task,) = load_trainer_config(write(tmp_path, [LOBRA_TASK | {"target_modules": value}])).tasks
    assert task.target_modules == TARGET_MODULES


@pytest.mark.parametrize("name", [*ADAPTED_MODULES, *MODULE_ALIASES])
def test_one_module_needs_no_list(tmp_path: Path, name: str) -> None:
    (task,) = load_trainer_config(write(tmp_path, [LOBRA_TASK | {"target_modules": name}])).tasks
    assert task.target_modules == resolve_target_modules([name])


def test_several_data_sets(tmp_path: Path) -> None:
    names = ["data/dolly.jsonl", "xsum"]
    (task,) = load_trainer_config(write(tmp_path, [LOBRA_TASK | {"dataset_name": names}])).tasks
    assert task.dataset_name == task.dataset_names == tuple(names)
    assert task.name == "dolly"
    (task,) = load_trainer_config(write(tmp_path, [LOBRA_TASK | {"dataset_name": ["xsum"]}])).tasks
    assert (task.dataset_name, task.dataset_names) == ("xsum", ("xsum",))


def misnamed(field: str, theirs: str, value: Any = None) -> dict[str, Any]:
    """Return the task with a field under another program's name."""
    task: dict[str, Any] = dict(LOBRA_TASK)
    return task | {theirs: task.pop(field, 1) if value is None else value}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("r", "rank"),
        ("lora_r", "rank"),
        ("lora_rank", "rank"),
        ("alpha", "lora_alpha"),
        ("cutoff_len", "context_length"),
        ("max_length", "context_length"),
        ("max_seq_length", "context_length"),
        ("sequence_len", "context_length"),
        ("batch_size", "global_batch_size"),
        ("micro_batch_size", "global_batch_size"),
        ("per_device_train_batch_size", "global_batch_size"),
        ("gradient_accumulation_steps", "global_batch_size"),
        ("dataset", "dataset_name"),
        ("datasets", "dataset_name"),
        ("lora_target_modules", "target_modules"),
        ("lora_target", "target_modules"),
        ("num_epochs", "epochs"),
        ("num_train_epochs", "epochs"),
        ("max_steps", "steps"),
        ("lr", "learning_rate"),
        ("scheduler", "lr_scheduler"),
        ("lr-scheduler-type", "lr_scheduler"),
        ("warmup_ratio", "warmup_steps"),
        ("val_set_size", "validation_split"),
    ],
)
def test_names_people_know_are_translated(tmp_path: Path, theirs: str, ours: str) -> None:
    (problem,) = problems_of(write(tmp_path, [misnamed(ours, theirs)]))
    assert problem.startswith(f"task[0].{theirs}: is no field here: ")
    assert ours in problem and "json_key" not in problem


def test_what_belongs_to_the_run_is_said_to(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, [LOBRA_TASK | {"output_dir": "out"}]))
    assert "lobra train --output-dir" in problem


def test_a_task_that_is_not_in_the_list(tmp_path: Path) -> None:
    problems = problems_of(write(tmp_path, [LOBRA_TASK], rank=8, lora_r=8))
    assert problems == (
        "rank: is no field here: it belongs into the entries of `task`",
        "lora_r: is no field here: it is called rank, in the entries of `task`",
    )


def test_known_fields_are_listed_once(tmp_path: Path) -> None:
    strangers = {"colour": 1, "shape": 2, "rnk": 3, "lora_r": 4}
    problems = problems_of(write(tmp_path, [LOBRA_TASK | strangers] * 3))
    assert len(problems) == 12
    text = "\n".join(problems)
    assert text.count("json_key") == 1 and text.count("it is called rank") == 3
    assert text.count("did you mean 'rank'") == 3
    assert "json_key" in problems[0]


def test_foreign_names_are_none_of_ours() -> None:
    ours = {field.name for field in dataclasses.fields(TaskConfig)}
    assert not ours & foreign_names._HINTS.keys()
    assert {field for field, _ in foreign_names._HINTS.values() if field} <= ours


def test_five_mistakes_are_all_named(tmp_path: Path) -> None:
    bad = LOBRA_TASK | {
        "rank": -4,
        "lora_alpha": True,
        "target_modules": ["q_prj"],
        "learning_rte": 1e-4,
        "context_length": "8k",
    }
    problems = problems_of(write(tmp_path, [LOBRA_TASK, bad]))
    assert len(problems) == 5
    for field, value, right in (
        ("rank", "-4", "a positive integer"),
        ("lora_alpha", "true", "a positive number"),
        ("target_modules[0]", '"q_prj"', "did you mean 'q_proj'"),
        ("learning_rte", "", "did you mean 'learning_rate'"),
        ("context_length", '"8k"', "a positive integer"),
    ):
        (problem,) = (p for p in problems if p.startswith(f"task[1].{field}"))
        assert value in problem and right in problem


OF_ADAPTERS = ("rank", "lora_alpha", "target_modules")
WRONG_VALUES: list[tuple[str, Any]] = [
    ("rank", 0),
    ("rank", True),
    ("rank", 16.0),
    ("rank", "16"),
    ("lora_alpha", 0),
    ("lora_alpha", float("nan")),
    ("lora_alpha", 10**400),
    ("target_modules", []),
    ("target_modules", "q_proj,v_proj"),
    ("target_modules", "all_lineare"),
    ("max_samples", 0),
    ("max_samples", "100"),
    ("dataset_name", []),
    ("dataset_name", ["dolly", " "]),
    ("dataset_name", ["dolly", ["xsum"]]),
    ("target_modules", [["q_proj"]]),
    ("global_batch_size", -1),
    ("dataset_name", ""),
    ("dataset_name", 7),
    ("context_length", 0),
    ("json_key", 3),
    ("steps", 0),
    ("epochs", -2),
    ("learning_rate", 0),
    ("learning_rate", float("inf")),
    ("learning_rate", "1e-4"),
    ("weight_decay", -0.1),
    ("lr_scheduler", "cosin"),
    ("lr_scheduler", ["cosine"]),
    ("warmup_steps", -1),
    ("warmup_steps", 22),
    ("max_grad_norm", -1),
    ("lora_dropout", 1),
    ("seed", -1),
    ("seed", 1.5),
    ("prompt", "alpacca"),
    ("prompt", 3),
    ("prompt", "{instruct}"),
    ("train_on_inputs", 1),
    ("validation_split", 1.0),
    ("resume_from", False),
    ("adapter", "lor"),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", ["q_proj"]),
    ("alpha_pattern", {"(q_proj": 2.0}),
    ("optimizer", "adam"),
    ("adam_beta2", 1.0),
    ("adam_epsilon", 0),
    ("momentum", 0.9),  # SGD's: the task's optimiser is AdamW
    ("loraplus_ratio", 0),
    ("modules_to_save", 7),
    ("modules_to_save", [""]),
    ("bias", "some"),
    ("objective", "ppo2"),
    ("objective", 1),
    ("beta", 0),
    ("beta", 0.2),  # a supervised task has none
    ("cpo_alpha", -1),
    ("clip_low", 1),
    ("temperature", 0),
    ("contrast_weight", -1),
    ("clip_high", 1.3),  # a supervised task has none
    ("desirable_weight", -1),
    ("undesirable_weight", "1"),
    ("name", "../up"),
    ("name", "a/b"),
    ("name", ".hidden"),
]


@pytest.mark.parametrize(("field", "value"), WRONG_VALUES)
def test_one_wrong_value_is_one_problem_that_names_it(
    tmp_path: Path, field: str, value: Any
) -> None:
    (problem,) = problems_of(write(tmp_path, [LOBRA_TASK | {field: value}]))
    assert problem.startswith(f"task[0].{field}")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"adapter": "vera", "bias": "all"}, "task[0].bias = "),
        ({"loraplus_ratio": 2, "target_modules": "embed_tokens"}, "task[0].loraplus_ratio = 2"),
        ({"loraplus_ratio": 2, "bias": "lora_only"}, "task[0].loraplus_ratio = 2"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, fields: dict[str, Any], problem: str) -> None:
    (found,) = problems_of(write(tmp_path, [LOBRA_TASK | fields]))
    assert found.startswith(problem)


@pytest.mark.parametrize(
    "field", ["rank", "lora_alpha", "target_modules", "global_batch_size", "dataset_name"]
)
@pytest.mark.parametrize("absent", [True, False])
def test_required_fields(tmp_path: Path, field: str, absent: bool) -> None:
    task: dict[str, Any] = LOBRA_TASK | {field: None}
    if absent:
        del task[field]
    (problem,) = problems_of(write(tmp_path, [task]))
    assert problem.startswith(f"task[0].{field}: is missing")


def test_a_model_needs_no_rank_and_is_for_those_who_ask(tmp_path: Path) -> None:
    own = {key: LOBRA_TASK[key] for key in LOBRA_TASK if key not in OF_ADAPTERS}
    path = write(tmp_path, [own | {"adapter": "full"}])
    (task,) = load_trainer_config(path, whole_models=True).tasks
    assert task.adapter == "full"
    (problem,) = problems_of(path)
    assert "profiles and plans are made for adapters only" in problem
    (problem,) = problems_of(write(tmp_path, [own | {"adapter": "full", "objective": "dpo"}]))
    assert problem.startswith("task[0].objective")


def test_steps_or_epochs_is_enough_but_not_neither(tmp_path: Path) -> None:
    bare = {key: value for key, value in LOBRA_TASK.items() if key not in ("steps", "epochs")}
    (problem,) = problems_of(write(tmp_path, [bare | {"steps": None}]))
    assert "neither steps nor epochs" in problem
    (by_epochs,) = load_trainer_config(write(tmp_path, [bare | {"epochs": 2}])).tasks
    assert (by_epochs.steps, by_epochs.epochs) == (None, 2)
    (by_steps,) = load_trainer_config(write(tmp_path, [bare | {"steps": 9}])).tasks
    assert (by_steps.steps, by_steps.epochs) == (9, 1)


def test_the_first_tasks_are_used(tmp_path: Path) -> None:
    tasks = [LOBRA_TASK | {"name": name} for name in "abc"]
    path = write(tmp_path, tasks, train_task_num=2)
    assert [task.name for task in load_trainer_config(path).tasks] == ["a", "b"]
    assert [task.name for task in load_trainer_config(path, num_tasks=3).tasks] == ["a", "b", "c"]
    assert [task.name for task in load_trainer_config(path, num_tasks=1).tasks] == ["a"]
    (problem,) = problems_of(path, num_tasks=4)
    assert "4 tasks" in problem and "at most 3" in problem
    assert len(problems_of(path, num_tasks=0)) == 1


@pytest.mark.parametrize("count", [4, 0, True, "3"])
def test_wrong_counts_of_tasks(tmp_path: Path, count: Any) -> None:
    (problem,) = problems_of(write(tmp_path, [LOBRA_TASK] * 3, train_task_num=count))
    assert problem.startswith("train_task_num")


def test_names_are_unique_and_safe(tmp_path: Path) -> None:
    names = ["dolly", "data/dolly.jsonl", "owner/Dolly", "../../etc/pass wd", "...", "dolly_2"]
    tasks = [LOBRA_TASK | {"dataset_name": name} for name in names]
    config = load_trainer_config(write(tmp_path, [*tasks, LOBRA_TASK | {"name": "dolly_3"}]))
    found = [task.name for task in config.tasks]
    assert len({name.casefold() for name in found}) == len(found)
    assert all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", name) for name in found)
    assert found[0] == "dolly" and found[-1] == "dolly_3"
    (problem,) = problems_of(
        write(tmp_path, [LOBRA_TASK | {"name": "A"}, LOBRA_TASK | {"name": "a"}])
    )
    assert problem.startswith("task[1].name") and "task[0]" in problem


@pytest.mark.parametrize("document", ["[]", "3", '{"task": {}}', '{"task": []}', '{"task": [3]}'])
def test_documents_of_the_wrong_shape(tmp_path: Path, document: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(document)
    assert len(problems_of(path)) == 1


def test_unknown_top_fields_are_named(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, [LOBRA_TASK], train_tasks_num=1))
    assert "'train_task_num'" in problem


def test_a_missing_configuration_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer_config").mkdir()
    write(tmp_path / "trainer_config", [LOBRA_TASK], "exp_task6.json")
    assert load_trainer_config("exp_task6").name == "exp_task6"
    assert load_trainer_config("trainer_config/exp_task6.json").name == "exp_task6"
    with pytest.raises(ConfigError, match=r"did you mean 'exp_task6'.*exp_task7\.json"):
        load_trainer_config("exp_task7")
    for impossible in ("", ".", "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError):
            load_trainer_config(impossible)


def test_task_sets_that_come_with_the_project_are_found_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_root: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.json"):
        config = load_trainer_config(name)
        assert config.path.resolve() == project_root / "trainer_config" / "quickstart.json"
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart'.*brings exp_task12, .*real4"):
        load_trainer_config("quickstar")
    (tmp_path / "trainer_config").mkdir()
    write(tmp_path / "trainer_config", [LOBRA_TASK], "quickstart.json")
    assert len(load_trainer_config("quickstart").tasks) == 1, "the working folder's comes first"


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("quickstart", 4),
        ("exp_task4", 4),
        ("exp_task6", 6),
        ("exp_task12", 12),
        ("real4", 4),
        ("real12", 12),
    ],
)
def test_the_projects_own_files_load(project_root: Path, name: str, count: int) -> None:
    config = load_trainer_config(project_root / "trainer_config" / f"{name}.json")
    assert len(config.tasks) == count


@pytest.mark.parametrize(
    ("config", "lengths"),
    [
        ("exp_task6", "lobra_like_6tasks"),
        ("exp_task12", "lobra_like_12tasks"),
        ("real12", "real_12tasks"),
    ],
)
def test_task_names_are_those_of_the_shared_lengths(
    project_root: Path, shared: Path, config: str, lengths: str
) -> None:
    tasks = load_trainer_config(project_root / "trainer_config" / f"{config}.json").tasks
    keys = load_lengths(shared / "lengths" / f"{lengths}.json").keys()
    assert {task.name for task in tasks} == set(keys)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*LOBRA_TASK, "name", "prompt", "learning_rate", "seed", "resume_from"])


@given(changes=st.dictionaries(fields, values, max_size=4), top=values)
@settings(deadline=None, max_examples=200)
def test_whatever_a_file_holds_it_loads_or_says_what_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], top: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for document in ({"task": [LOBRA_TASK | changes, LOBRA_TASK]}, {"task": top}, top):
        path = folder / "fuzz.json"
        path.write_text(json.dumps(document))
        try:
            config = load_trainer_config(path)
        except ConfigError as error:
            assert all(problem.startswith(str(path)) for problem in error.problems)
        else:
            assert config.tasks
            assert all(task.rank > 0 and task.target_modules for task in config.tasks)


def test_importing_it_is_light() -> None:
    program = (
        "import sys, tasks.task_file\n"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'numpy', 'yaml'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_which_of_steps_and_epochs_counts_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = {key: value for key, value in LOBRA_TASK.items() if key not in ("steps", "epochs")}
    problems = problems_of(write(tmp_path, [theirs | {"max_steps": 5, "num_epochs": 2}]))
    assert problems == (
        "task[0].max_steps: is no field here: it is called steps, and counts where epochs is given "
        "too",
        "task[0].num_epochs: is no field here: it is called epochs, and counts where steps is not "
        "given",
    )
    load_trainer_config(write(tmp_path, [LOBRA_TASK | {"steps": 5, "epochs": 1}]))
    assert not caplog.text
    load_trainer_config(write(tmp_path, [LOBRA_TASK | {"steps": 5, "epochs": 2}]))
    assert "its 5 steps count, its 2 epochs do not" in caplog.text
