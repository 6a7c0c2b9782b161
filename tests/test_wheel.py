"""A wheel, installed where no checkout is seen, plans and trains among other modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.assets.golden import copy_inputs
from tests.commands.test_plan import files  # noqa: F401 (a fixture)
from tests.commands.test_without_torch import WORKFLOW, check_workflow
from tests.report.runs import write_run

# What a user's folder may hold: names of our packages, of libraries, of the standard library.
IN_THE_WAY = (
    "model/__init__.py", "datasets/__init__.py", "tasks.py", "planner.py", "trainer.py",
    "common.py", "layout.py", "tokenizers.py", "signal.py",
)  # fmt: skip
LEFT_OUT = ("tests", "docs", "benchmarks", "experiments", "runs", "models", "data")


@pytest.fixture(scope="module")
def wheel(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy of the checkout and return it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", *LEFT_OUT)
    shutil.copytree(project_root, folder / "copy", symlinks=True, ignore=ignored)
    pip(
        "wheel", str(folder / "copy"), "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", str(folder),
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def lobra(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own and return its `lobra`.

    The dependencies are this environment's, found after the new one's own packages. A line of a
    .pth file is a folder and no more: the checkout's editable installation is not seen.
    """
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = folder.glob("lib/python3*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "zz_dependencies.pth").write_text("\n".join(here) + "\n")
    found = run(python, "-c", "import lobra, torch; print(lobra.__file__)", cwd=folder)
    assert Path(found.strip()) == packages / "lobra" / "__init__.py"
    return folder / "bin" / "lobra"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of modules that must not be imported."""
    for name in IN_THE_WAY:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise ImportError('{name} of the working folder')\n")
    return tmp_path


def pip(*arguments: str) -> None:
    run(Path(sys.executable), "-m", "pip", "--disable-pip-version-check", *arguments)


def run(command: Path, *arguments: str, cwd: Path | None = None) -> str:
    """Run a command without what this environment's variables would add; return its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(command), *arguments],
        cwd=cwd, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "of the working folder" not in done.stdout
    return done.stdout


def test_what_is_in_the_wheel(wheel: Path, project_root: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        (described,) = (name for name in file.namelist() if name.endswith("/entry_points.txt"))
        entry_points = file.read(described).decode()
    assert {name.split("/")[0] for name in names} == {"lobra"}
    assert "lobra = lobra.cli:main" in entry_points
    assert "deploy_strategy_plan = lobra.commands.plan:main" in entry_points
    folder = project_root / "lobra"
    expected = {
        path.relative_to(project_root).as_posix()
        for part in (folder, *(path for path in folder.iterdir() if path.is_dir()))
        for path in (part.rglob("*") if part != folder else part.iterdir())
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected, "every file of the packages, and nothing else"
    assert names >= {
        "lobra/py.typed",
        "lobra/commands/template.yaml",
        "lobra/profiler/accelerators.yaml",
        "lobra/trainer_config/quickstart.json",
        "lobra/trainer_config/exp_task12.json",
    }


@pytest.mark.ranks
@pytest.mark.parametrize(
    "data", ["lengths and tokens", pytest.param("embedded", marks=pytest.mark.long)]
)
def test_it_plans_and_trains(
    lobra: Path, wheel: Path, place: Path, project_root: Path, data: str
) -> None:
    """On a task set of its own; three ranks of two layouts start in that folder too."""
    assert run(lobra, "--version", cwd=place) == f"lobra {wheel.name.split('-')[1]}\n"
    run(lobra, "init", "mine.yaml", cwd=place)
    assert len(yaml.safe_load((place / "mine.yaml").read_text())["task"]) == 4

    profiles = project_root / "exp_result" / "profile" / "cpu-2-cores"
    quickstart = [
        "--model", "tiny", "--trainer-config", "quickstart", "--num-tasks", "2",
        "--max-seq-length", "2048", "--time-profile", str(profiles / "profile_time_tiny.csv"),
    ]  # fmt: skip
    memory = ["--memory-profile", str(profiles / "max_tokens_tiny_4tasks.csv")]
    if data == "embedded":
        lengths, training, tasks = [], quickstart, {"docstring", "signature"}
    else:
        known = {"docstring": [*range(20, 400), 2000], "signature": list(range(20, 200))}
        (place / "lengths.json").write_text(json.dumps(known))
        lengths = ["--lengths", "lengths.json"]
        copy_inputs(place)
        training = ["--model", "base", "--trainer-config", "tasks.json"]
        training += ["--time-profile", "time.csv"]
        tasks = {"everything", "few"}
    plan = ["--strategy-config", "mine"]
    run(lobra, "plan", *quickstart, *plan, *memory, *lengths, "--num-gpus", "3", cwd=place)
    groups = yaml.safe_load((place / "strategy_config/mine.yaml").read_text())["strategy_config"]
    assert {(group["tp"], group["pp"]) for group in groups} == {(1, 1), (2, 1)}

    where = ["--device", "cpu", "--max-steps", "1", "--output-dir", "run"]
    run(lobra, "train", *training, *plan, *where, cwd=place)
    (step,) = (place / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(step)["tasks"].keys() == tasks
    written = place.glob("run/adapters/*/adapter_model.safetensors")
    assert {path.parent.name for path in written} == tasks


@pytest.mark.long
def test_a_base_installation_plans_without_torch(wheel: Path, files: Path) -> None:  # noqa: F811
    """As a laptop that only plans has it: with the packages the wheel asks for, from the index."""
    environment = files / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip("--python", str(python), "install", "--quiet", str(wheel))
    packages = run(python, "-c", "import importlib.util as u; print(u.find_spec('torch'))")
    assert packages.strip() == "None"
    write_run(files / "run", ["short", "long"], 4)
    done = [
        subprocess.run(
            [str(environment / "bin" / "lobra"), *words],
            cwd=files, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )
        for words, _ in WORKFLOW
    ]  # fmt: skip
    check_workflow(files, ((one.returncode, one.stdout) for one in done))
