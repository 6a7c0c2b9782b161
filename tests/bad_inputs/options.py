"""Options, host files, environment files."""

from __future__ import annotations

from typing import Any

from tests.bad_inputs.case import Case

#: Of each option, values that are none of it.
WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "--output-dir": ("train", ("", " ", ".", "..", "/", "base", "data")),
    "--confine": ("train", ("none", "tasks.json")),
    "--model": ("train", ("",)),
    "--data-dir": ("train", ("",)),
    "--num-gpus": ("plan", ("0", "-1", "1.5", "many", "1000000000", "9" * 30)),
    "--max-steps": ("train", ("0", "x", "9" * 30)),
    "--num-buckets": ("train", ("0", "99999999", "x")),
    "--torch-profiler": ("train", ("0", "3-1", "9" * 5000)),
    "--seed": ("train", ("-1", "x", "9" * 30)),
    "--save-every": ("train", ("-1", "1.5")),
    "--validate-every": ("train", ("-1", "x")),
    "--max-seq-length": ("train", ("0", "1e3", "9" * 12)),
    "--gpus-per-node": ("train", ("0", "x")),
    "--precision": ("train", ("fp8", "")),
    "--device": ("train", ("tpu",)),
    "--batching": ("train", ("loose",)),
    "--memory": ("train", ("all",)),
    "--base-precision": ("train", ("fp4", "")),
    "--server-port": ("train", ("0", "99999999", "ssh")),
    "--server-addr": ("train", ("-oProxyCommand=id", "a b", "")),
    "--time-limit": ("plan", ("0", "-1", "nan", "inf", "soon")),
    "--pattern": ("plan", ("BEST",)),
    "--sweep-gpus": ("plan", ("8", "8:4", "0:4", "a:b", "1:1000000000")),
    "--steps": ("simulate", ("0", "x", "9999999999")),
    "--resume": ("train", ("first",)),
}
HOSTS: dict[str, tuple[str | bytes | None, str]] = {
    "empty": ("", "no host in it"),
    "comment": ("# nobody\n", "no host in it"),
    "no-slots": ("a\n", "hosts:1"),
    "zero": ("a slots=0\n", "hosts:1"),
    "negative": ("a slots=-1\n", "hosts:1"),
    "superscript": ("a slots=²\n", "hosts:1"),
    "word": ("a slots=many\n", "hosts:1"),
    "digits": ("a slots=" + "9" * 5000 + "\n", "hosts:1"),
    "twice": ("a slots=1\na slots=2\n", "hosts:2: host 'a' is listed twice"),
    "option": ("-oProxyCommand=id slots=4\n", "want a host's name or address"),
    "quote": ("a;reboot slots=4\n", "want a host's name or address"),
    "long": ("x" * 300 + " slots=4\n", "want a host's name or address"),
    "latin": (b"\xe9 slots=1\n", "not UTF-8"),
    "few": ("a slots=1\n", "the plan needs 3"),
    "pipe": (None, "no regular file"),
}
ENVIRONMENTS: dict[str, tuple[str | None, str]] = {
    "exits": ("export A=1\nexit 0\n", "want assignments, without exit"),
    "fails": ("false\n", "failed with exit code 1"),
    "command": ("no-such-command-here\n", "failed with exit code 127"),
    "syntax": ("if then\n", "failed with exit code"),
    "pipe": (None, "no regular file"),
}


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for option, (command, values) in WRONG.items():
        for number, value in enumerate(values):
            says: tuple[Any, ...] = (option.removeprefix("--"),)
            cases[f"{option}-{number}"] = Case(says, None, (f"{option}={value}",), command)
    for name, (hosts, said) in HOSTS.items():
        cases[f"hosts-{name}"] = Case(("hosts", said), {"hosts": hosts}, ("--host-file", "hosts"))
    for name, (script, said) in ENVIRONMENTS.items():
        cases[f"env-{name}"] = Case(("env.sh", said), {"env.sh": script}, ("--env-file", "env.sh"))
    return cases


CASES = _cases() | {
    "hosts-nowhere": Case(("none: cannot be read",), None, ("--host-file", "none")),
    "env-nowhere": Case(("--env-file none: no such file",), None, ("--env-file", "none")),
    "env-folder": Case(("no regular file",), None, ("--env-file", "data")),
    "option-nowhere": Case(("--rnak: no such option",), None, ("--rnak", "4")),
    "output-is-a-file": Case(("tasks.json is a file",), None, ("--output-dir", "tasks.json")),
    "output-long-name": Case(("File name too long",), None, ("--output-dir", "x" * 300)),
    "fewer-gpus": Case(("needs 3 ranks, but only 1",), None, ("--num-gpus", "1")),
    "endless-profiler": Case(
        ("--torch-profiler 1-1000000000000: want at most 1000 steps",),
        None,
        ("--torch-profiler", "1-1000000000000"),
    ),
    "revive-without-resume": Case(
        ("--revive: only a run that goes on",), None, ("--revive", "few")
    ),
    "no-data-dir": Case(("no such data set",), None, ("--data-dir", "none")),
    "doctor-hosts": Case(
        ("hosts:1",), {"hosts": "a slots=²\n"}, ("--host-file", "hosts"), "doctor"
    ),
    "doctor-node": Case(("--gpus-per-node 0",), None, ("--gpus-per-node", "0"), "doctor"),
    "doctor-plan": Case(
        ("none.yaml: no such plan",), None, ("--strategy-config", "none"), "doctor"
    ),
}
