"""Asking a host of a host file about itself, by ssh as DeepSpeed's launcher reaches it."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lobra.trainer.host_probe import MARK

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
ANSWER_S = 60.0  # starting Python may be slow on a network's file system


class NoAnswer(RuntimeError):
    """A host does not say what it was asked for; the message says why.

    Attributes
    ----------
    host
        Its name.
    """

    def __init__(self, host: str, why: str) -> None:
        super().__init__(why)
        self.host = host


class Unreachable(NoAnswer):
    """A host does not answer."""


class Denied(NoAnswer):
    """A host answers that its system denies what it was asked for."""


def answers(host: str) -> bool:
    """Return whether a host can be reached by ssh."""
    return why_silent(host) is None


def why_silent(host: str) -> str | None:
    """Return why a host cannot be reached by ssh, None if it can."""
    try:
        done = subprocess.run(
            [*SSH, host, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=ANSWER_S
        )
    except OSError as error:
        return f"ssh: {error.strerror}"
    except subprocess.TimeoutExpired:
        return f"no answer within {ANSWER_S:.0f} s"
    if done.returncode == 0:
        return None
    return _last_line(done.stderr) or f"ssh ended with exit code {done.returncode}"


def _last_line(said: bytes) -> str:
    """Return the last line that is not blank, "" if there is none."""
    lines = said.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class RemoteHost:
    """A process of `trainer.host_probe` on a host, from the beginning of a block to its end."""

    def __init__(self, name: str, *, by_ssh: bool, env_file: Path | None = None) -> None:
        """Start it, as ranks are started: in this folder, with this Python and environment file.

        Parameters
        ----------
        name
            Of the host.
        by_ssh
            Whether it is reached by ssh; else it is this machine.
        env_file
            A file that bash sources there first.
        """
        self.name = name
        sourced = ""
        if env_file is not None:
            sourced = f"set -a; . {shlex.quote(str(env_file.resolve()))} >&2; set +a; "
        script = (
            f"set -e; cd {shlex.quote(os.getcwd())}; {sourced}"
            f"exec {shlex.quote(sys.executable)} -m lobra.trainer.host_probe"
        )
        over = [*SSH, name, f"bash -c {shlex.quote(script)}"]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._process = subprocess.Popen(
            over if by_ssh else ["bash", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, bufsize=0,
        )  # fmt: skip

    def __enter__(self) -> RemoteHost:
        """Begin the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def ask(self, request: str, *arguments: Any) -> Any:
        """Return the answer to a request of `trainer.host_probe`.

        Raises
        ------
        Unreachable
            There is none.
        Denied
            The system there denies it.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps([request, *arguments]).encode() + b"\n")
        except BrokenPipeError:
            raise Unreachable(self.name, self._why()) from None
        answer = json.loads(self._line())
        if "error" in answer:
            raise Denied(self.name, answer["error"])
        return answer["value"]

    def _line(self) -> bytes:
        """Return the next answer; lines of others are skipped."""
        output = self._process.stdout
        assert output
        until = time.monotonic() + ANSWER_S
        while select.select([output], [], [], max(0.0, until - time.monotonic()))[0]:
            line = output.readline()
            if not line:
                raise Unreachable(self.name, self._why())
            if line.startswith(MARK.encode()):
                return line.removeprefix(MARK.encode())
        raise Unreachable(self.name, f"no answer within {ANSWER_S:.0f} s")

    def _why(self) -> str:
        """Return the last thing that a process which has ended complained of."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._complaints.seek(0)
        return _last_line(self._complaints.read()) or f"it ended with exit code {code}"
