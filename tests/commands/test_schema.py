"""`lobra schema` against the loaders, with a validator that is not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lobra.cli import main
from lobra.commands.init import TEMPLATE
from lobra.common.documents import read_document
from lobra.common.errors import ConfigError
from lobra.layout.plan import load_plan
from lobra.tasks.task_file import load_trainer_config
from tests.tasks.test_config import LOBRA_TASK, WRONG_VALUES

GROUP = {"dp": 6, "tp": 1, "pp": 1, "max_tokens": 2048}
PLAN = {"strategy_config": [GROUP], "meta": {"model": "7B", "ranks": [[[0]]], "else": 1}}
#: What takes more than the type and the bounds of one value.
BEYOND_A_SCHEMA: dict[str, tuple[Any, ...]] = {
    "prompt": ("alpacca", "{instruct}"),
    "warmup_steps": (22,),
    "rank": (16.0,),
    "lora_alpha": (10**400,),
    "learning_rate": (float("inf"),),
    "beta": (0.2,),
    "clip_high": (1.3,),
    "momentum": (0.9,),
    "alpha_pattern": ({"(q_proj": 2.0},),
}


@pytest.fixture
def validator(capsys: pytest.CaptureFixture[str]) -> Callable[[str], Draft202012Validator]:
    def of(kind: str) -> Draft202012Validator:
        assert main(["schema", kind]) == 0
        schema = json.loads(capsys.readouterr().out)
        Draft202012Validator.check_schema(schema)
        return Draft202012Validator(schema)

    return of


def loads(load: Callable[[Path], Any], document: Any, folder: Path) -> bool:
    path = folder / "file.yaml"  # of which JSON is a part
    path.write_text(json.dumps(document))
    try:
        load(path)
    except ConfigError:
        return False
    return True


def test_the_files_of_the_project_follow_it(
    validator: Callable[[str], Draft202012Validator], project_root: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "all.yaml"  # every field that is commented out, switched on
    whole.write_text(re.sub(r"^( *)#(\w+: )", r"\1\2", TEMPLATE.read_text(), flags=re.MULTILINE))
    shipped = sorted((project_root / "trainer_config").glob("*.json"))
    assert len(shipped) > 5
    for path in (*shipped, TEMPLATE, whole, project_root / "tests/assets/formats/tasks.json"):
        validator("tasks").validate(read_document(path))
    plans = sorted((project_root / "tests/assets").rglob("plan*.yaml"))
    assert len(plans) > 1
    for path in plans:
        validator("plan").validate(read_document(path))


def test_it_refuses_wrong_values_of_a_task(
    validator: Callable[[str], Draft202012Validator], tmp_path: Path
) -> None:
    follows = validator("tasks").is_valid
    wrong = [
        (field, value)
        for field, value in WRONG_VALUES
        if value not in BEYOND_A_SCHEMA.get(field, ()) and value == value
    ]
    for field, value in [*wrong, ("rnk", 8), ("lora_r", 8), ("context_length", None)]:
        document = {"task": [LOBRA_TASK, LOBRA_TASK | {field: value}]}
        assert not follows(document), (field, value)
        assert not loads(load_trainer_config, document, tmp_path)


BARE = {key: value for key, value in LOBRA_TASK.items() if key not in ("steps", "epochs")}


@pytest.mark.parametrize(
    ("document", "is_right"),
    [
        ({"task": [LOBRA_TASK]}, True),
        ({"task": [LOBRA_TASK | {"learning_rate": None, "name": None}], "variant": None}, True),
        ({"task": [BARE | {"epochs": 2}], "train_task_num": 1}, True),
        ({"task": [BARE]}, False),
        ({"task": [LOBRA_TASK], "train_task_num": 0}, False),
        ({"task": [LOBRA_TASK], "variant": "both"}, False),
        ({"task": [LOBRA_TASK], "tasks": []}, False),
        ({"task": []}, False),
        ({"task": LOBRA_TASK}, False),
        ({"task": [3]}, False),
        ({}, False),
        ([], False),
    ],
)
def test_it_agrees_on_files_of_tasks(
    validator: Callable[[str], Draft202012Validator],
    tmp_path: Path,
    document: Any,
    is_right: bool,
) -> None:
    assert validator("tasks").is_valid(document) == is_right
    assert loads(load_trainer_config, document, tmp_path) == is_right


@pytest.mark.parametrize(
    ("document", "is_right"),
    [
        (PLAN, True),
        ({"strategy_config": [GROUP | {"cp": 1, "memory": "full"}]}, True),
        ({"strategy_config": [GROUP | {"cp": None, "memory": None}], "meta": None}, True),
        *(
            ({"strategy_config": [GROUP, GROUP | {name: value}]}, False)
            for name, value in (
                *((name, value) for name in GROUP for value in (0, -1, True, "1", 1.5, None, [1])),
                *(("cp", 0), ("memory", "ful"), ("memory", True), ("dpp", 1)),
            )
        ),
        *((PLAN | {"meta": meta}, False) for meta in ([], 3, {"ranks": [["0"]]}, {"buckets": 2})),
        (PLAN | {"metta": {}}, False),
        ({"strategy_config": []}, False),
        ({"strategy_config": GROUP}, False),
        ({}, False),
        ([], False),
    ],
)
def test_it_agrees_on_plans(
    validator: Callable[[str], Draft202012Validator],
    tmp_path: Path,
    document: Any,
    is_right: bool,
) -> None:
    assert validator("plan").is_valid(document) == is_right
    assert loads(load_plan, document, tmp_path) == is_right


def test_every_field_is_described(validator: Callable[[str], Draft202012Validator]) -> None:
    for kind, nested in (("tasks", "TaskConfig"), ("plan", "PlanEntry")):
        schema: Any = validator(kind).schema
        for model in (schema, schema["$defs"][nested]):
            assert all("description" in field for field in model["properties"].values())
