"""The task file that `lobra init` writes, and its explanation in docs/tasks.md."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest
import yaml

from lobra.cli import main
from lobra.commands.init import DEFAULT_PATH, TEMPLATE
from lobra.common.documents import read_document
from lobra.common.models import json_schema
from lobra.tasks.config import TaskConfig
from lobra.tasks.task_file import TaskFile, load_trainer_config

#: # type (default): what it does, perhaps over two lines, and the field, perhaps commented out
FIELD = re.compile(
    r"^ *# [^(\n]+ \((?:default:? )?([^)]+)\): (.+\n(?: *# .+\n)?)[ -]*(#?)(\w+): (.+)$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Explained:
    default: str
    what: str
    commented: bool
    value: str


def explained() -> dict[str, Explained]:
    """Return every field that the file explains."""
    return {
        name: Explained(default, re.sub(r"\s+(# )?", " ", what).strip(), bool(mark), value)
        for default, what, mark, name, value in FIELD.findall(TEMPLATE.read_text())
    }


def test_every_field_is_explained_with_its_default() -> None:
    found = explained()
    known = {field.name: field for field in fields(TaskConfig)}
    assert found.keys() == {*known, "train_task_num", "variant"}
    for name, field in known.items():
        default = found[name].default
        if name == "name":
            assert default == "from dataset_name"
        elif field.default_factory is not MISSING:
            assert default == "none" and not field.default_factory()
        elif field.default is MISSING:
            assert default == "required" and not found[name].commented
        elif field.default is None:
            assert default in ("none", "all", "by epochs")
        else:
            assert yaml.safe_load(default) == field.default
            if found[name].commented:
                assert yaml.safe_load(found[name].value) == field.default


def test_the_explanations_are_those_of_the_schema() -> None:
    schema = json_schema(TaskFile)
    properties = {**schema["properties"], **schema["$defs"]["TaskConfig"]["properties"]}
    for name, field in explained().items():
        said = " ".join(properties[name]["description"].split())
        assert said.casefold() == f"{field.what}.".casefold(), name


def test_every_field_that_is_commented_out_can_be_switched_on(tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(re.sub(r"^( *)#(\w+: )", r"\1\2", TEMPLATE.read_text(), flags=re.MULTILINE))
    task = load_trainer_config(path).tasks[0]
    given = read_document(path)["task"][0]
    assert given.keys() == {field.name for field in fields(TaskConfig)}
    assert (task.max_samples, task.resume_from) == (1000, "runs/first/adapters/docstring")


def test_the_documentation_has_it_verbatim(project_root: Path) -> None:
    page = (project_root / "docs" / "tasks.md").read_text()
    assert f"```yaml\n{TEMPLATE.read_text()}```\n" in page


def test_it_is_the_quickstart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    project_root: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    said = capsys.readouterr().out
    assert "lobra train" in said and f"--trainer-config {DEFAULT_PATH}" in said
    written = load_trainer_config(DEFAULT_PATH)
    quickstart = load_trainer_config(project_root / "trainer_config" / "quickstart.json")
    assert written.tasks == quickstart.tasks
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.yaml"]


def test_a_file_is_replaced_by_force_only(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "new" / "mine.yaml"
    assert main(["init", str(path)]) == 0
    path.write_text("mine")
    assert main(["init", str(path)]) == 2
    assert f"{path}: is there already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["init", str(path), "--force"]) == 0
    assert path.read_bytes() == TEMPLATE.read_bytes()


@pytest.mark.parametrize("name", ["tasks.json", "", "file/below.yaml"])
def test_paths_that_are_none(tmp_path: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / name)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and "Traceback" not in output.err
    assert str(tmp_path / name) in output.err
