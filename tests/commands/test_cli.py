"""The `lobra` command: exit codes, mistakes in one message without a traceback."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lobra.cli import COMMANDS, guarded, main, make_app
from lobra.commands import doctor
from lobra.commands.finding import LACKS, NOTE, OK
from lobra.common.errors import ConfigError
from lobra.common.options import LauncherOptions
from tests.assets.golden import HERE as GOLDEN


def test_a_users_mistake_an_interruption_and_a_failure(capsys: pytest.CaptureFixture) -> None:
    def failing(error: BaseException):
        def run() -> int:
            raise error

        return run

    assert guarded(lambda: 0) == 0
    assert guarded(failing(ConfigError(["one thing", "another"]))) == 2
    message = capsys.readouterr().err
    assert "one thing" in message
    assert "another" in message
    assert "Traceback" not in message
    assert guarded(failing(KeyboardInterrupt())) == 130
    assert guarded(failing(RuntimeError("broken"))) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err


def imported_by(words: list[str], project_root: Path) -> tuple[str, set[str]]:
    """Return what a command shows, and the modules it imported for that."""
    program = (
        f"import sys\nfrom lobra.cli import main\nassert main({words!r}) == 0\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=project_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, set(result.stderr.split())


def test_help_lists_every_command_without_importing_any(project_root: Path) -> None:
    for parent in ("", "data", "profile", "experiment"):
        shown, imported = imported_by([*parent.split(), "--help"], project_root)
        assert not {"torch", "numpy", "deepspeed", "lobra.commands.plan"} & imported
        for name, (_, line) in COMMANDS.items():
            if name.rpartition(" ")[0] == parent:
                assert f"  {name.rpartition(' ')[2]} " in shown
                assert line in " ".join(shown.split())


@pytest.mark.parametrize("name", ["plan", "simulate", "init"])
def test_planning_explains_itself_without_heavy_imports(name: str, project_root: Path) -> None:
    _, imported = imported_by([name, "--help"], project_root)
    assert not {"torch", "pandas", "transformers", "deepspeed", "matplotlib"} & imported


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: lobra {name}" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("name", [name for name, (path, _) in COMMANDS.items() if path])
def test_every_option_of_every_command_has_help(name: str) -> None:
    module, _, function = (COMMANDS[name][0] or "").partition(":")
    command = getattr(importlib.import_module(module), function)
    options = make_app(default_command=command).assemble_argument_collection(parse_docstring=True)
    named = [option for option in options if option.parse and not option.children]
    assert named
    for option in named:
        assert option.parameter.help, option.name
        assert not any(text.startswith(("--no-", "--empty-")) for text in option.names[1:])


def test_an_unknown_command_or_option_is_a_users_mistake(capsys: pytest.CaptureFixture) -> None:
    for words, said in (
        (["trian"], "did you mean 'train'"),
        (["profile", "tim"], "did you mean 'time'"),
        (["report", "run", "--plot"], "--plot: no such option (did you mean '--plots'?)"),
        (["report", "run", "--no-plots"], "--no-plots: no such option"),
        (["report", "run", "--bogus", "--tracee"], "2 problems"),
        (["report", "run", "other"], "not expected here: other"),
        (["profile", "fit", "--folds", "x"], "--folds"),
        (["profile", "fit", "--folds", "1.5"], "--folds: '1.5' is not an integer"),
        (["profile", "fit", "--folds"], "--folds"),
        (["plan", "--modle", "7B", "--num-gpus=-3"], "4 problems"),
    ):
        assert main(words) == 2
        output = capsys.readouterr()
        assert output.out == "" and output.err.startswith("lobra: ")
        assert said in output.err and "Traceback" not in output.err


def test_an_argument_told_by_its_place_is_missing_only_where_it_is(
    capsys: pytest.CaptureFixture,
) -> None:
    for words, said in (
        (["experiment", "simulate", "7B"], ["--output: is required"]),
        (["experiment", "simulate"], ["MODEL: is required", "--output: is required"]),
        (["report"], ["RUN: is required"]),
        (["tasks", "add"], ["RUN: is required", "FILE: is required"]),
        (["tasks", "add", "runs/a"], ["FILE: is required"]),
        (["tasks", "cancel", "--timeout", "5"], ["RUN: is required", "NAME: is required"]),
    ):
        assert main(words) == 2
        output = capsys.readouterr().err
        assert all(text in output for text in said)
        assert output.count("is required") == len(said)


def test_a_command_that_lacks_its_subcommand_shows_help(capsys: pytest.CaptureFixture) -> None:
    for words in ([], ["data"], ["profile"]):
        assert main(words) == 2
        assert "commands:" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lobra ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("profile time --model tiny --tp 1,x", "--tp '1,x'"),
        ("profile time --model BASE --tp 3 --device cpu", "tp 3 does not divide the 4"),
        ("profile time --model nosuch --tp 1 --device cpu", "model 'nosuch'"),
        ("profile memory --model tiny --num-gpus 0 --trainer-config quickstart", "--num-gpus 0"),
        (
            "profile memory --model BASE --num-gpus 2 --trainer-config quickstart --device cpu "
            "--memory-budget much",
            "memory budget 'much'",
        ),
        ("profile fit --time-profile nosuch.csv", "nosuch.csv: no such profile"),
    ],
)
def test_mistakes_of_the_profilers(
    arguments: str,
    message: str,
    project_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer_config").symlink_to(project_root / "trainer_config")
    assert main(arguments.replace("BASE", str(GOLDEN / "base")).split()) == 2
    output = capsys.readouterr().err
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "exp_result").exists(), "nothing half-written"


def test_fit_prints_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "t.csv"
    rows = [(1, s, b, 1 + 1e-3 * b * s) for s in (64, 128, 256, 512) for b in (1, 2, 4, 8)]
    lines = ["tp,seq_len,mbs,time", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["profile", "fit", "--time-profile", str(path)]) == 0
    output = capsys.readouterr().out
    assert "fitted" in output
    assert "lobra6" in output
    assert main(["profile", "fit", "--time-profile", str(path), "--json"]) == 0
    assert '"fitted": {"1": {"rows": 16' in capsys.readouterr().out


def test_the_doctor_says_what_a_plan_needs(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "strategy_config:\n  - {dp: 1, tp: 3, pp: 1, max_tokens: 2048}\n"
        "  - {dp: 1000, tp: 1, pp: 1, max_tokens: 1024}\n",
        encoding="utf-8",
    )
    findings = {f.subject: f for f in doctor.examine("tiny", str(plan), 8)}
    assert findings["plan"].text.startswith("<3,1>x1 <1,1>x1000: 1003 ranks")
    assert findings["layout <3,1>"].status == LACKS
    assert "does not divide" in findings["layout <3,1>"].text
    assert findings["Python"].status == OK
    assert findings["CPU ranks"].status == LACKS


def test_the_doctor_misses_a_compiler_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    findings = {f.subject: f for f in doctor.examine(None, None, None)}
    assert findings["triton"].status == NOTE


def test_the_doctor_says_whether_hosts_have_what_a_plan_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\necho no route to host >&2; exit 255\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    plan, hosts = tmp_path / "plan.yaml", tmp_path / "hosts"
    plan.write_text("strategy_config: [{dp: 6, tp: 1, pp: 1, max_tokens: 1024}]\n")
    for text, status, sizes in (
        ("localhost slots=8\n", OK, "6"),
        ("localhost slots=2\n127.0.0.1 slots=4\n", OK, "2, 4"),
        ("localhost slots=2\n127.0.0.1 slots=2\n", LACKS, "2"),
    ):
        hosts.write_text(text)
        launcher = LauncherOptions(host_file=hosts)
        findings = {f.subject: f for f in doctor.examine(None, str(plan), None, launcher)}
        assert findings["ranks"].status == status
        assert findings["placement"].text == f"fits nodes of {sizes} GPUs"
    assert findings["ranks"].text == "2 slots are missing: 2 hosts have 4"
    assert findings["host file"].text.startswith("hosts localhost, 127.0.0.1 are one machine")
    assert findings["host localhost"].status == LACKS
    assert findings["host localhost"].text.startswith("no answer: no route to host; see that")
    hosts.write_text("localhost\n")
    with pytest.raises(ConfigError) as caught:
        list(doctor.examine(None, str(tmp_path / "none.yaml"), None, launcher))
    assert len(caught.value.problems) == 2


def test_the_doctor_says_which_hosts_and_nodes_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ssh", "pdsh"):  # which reach nobody
        (tmp_path / name).write_text("#!/bin/sh\nexit 255\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    plan, hosts = tmp_path / "plan.yaml", tmp_path / "hosts"
    plan.write_text("strategy_config: [{dp: 1, tp: 4, pp: 1, max_tokens: 1024}]\n")
    hosts.write_text("nowhere.invalid slots=3\nneither.invalid slots=3\n")
    launcher = LauncherOptions(host_file=hosts)
    findings = {f.subject: f for f in doctor.examine("tiny", str(plan), None, launcher)}
    assert findings["ranks"].status == doctor.OK
    for name in ("nowhere.invalid", "neither.invalid"):
        assert findings[f"host {name}"].status == doctor.LACKS
    assert findings["placement"].status == doctor.LACKS
    assert "larger than a node of 3 GPUs" in findings["placement"].text


def test_typos_are_told_before_torch_is_imported(project_root: Path, tmp_path: Path) -> None:
    told = (
        (["generate", "--model", "70b", "--adapter", "nowhere"], "2 problems"),
        (["export", "--model", "70b", "--adapter", "nowhere", "--output-dir", "new"], "2 problems"),
        (["export"], "3 problems"),
        (["generate", "--adapter", "x"], "--model: is required"),
    )
    program = (
        "import sys\nfrom lobra.cli import main\n"
        f"for words, _ in {told!r}:\n"
        "    assert main(words) == 2\n    print('--', file=sys.stderr)\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(project_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "set()"
    for message, (_, said) in zip(result.stderr.split("--\n"), told, strict=False):
        assert said in message
