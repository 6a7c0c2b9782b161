"""DeepSpeed's launcher, for ranks on the machines of a host file.

It runs as a child: stop signals reach it and its ranks once, and nothing outlives us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from lobra.common.stop_signals import handled_by
from lobra.trainer.host_file import is_this_host
from lobra.trainer.run_hosts import RunHosts
from lobra.trainer.signals import SAME_REQUEST_S

POLL_S = 0.2
#: Of ssh, which pdsh starts for every host: so that it ends with a host that answers no more.
SSH_OPTIONS = "-o ConnectTimeout=30 -o ServerAliveInterval=15 -o ServerAliveCountMax=3"


def launcher_command(
    arguments: Sequence[str],
    hosts: RunHosts,
    num_gpus: int,
    server_addr: str | None,
    server_port: int | None,
    name: str = "train",
) -> list[str]:
    """Return the deepspeed launcher's command that runs `lobra name arguments` on all hosts.

    Raises
    ------
    ConfigError
        The hosts have fewer slots than the plan has ranks.
    """
    slots = hosts.chosen(num_gpus)
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts.file)]
    if slots != hosts.listed:  # deepspeed starts a rank on every slot it is given
        chosen = (f"{host}:{','.join(map(str, range(count)))}" for host, count in slots.items())
        command += ["--include", "@".join(chosen)]
    if len(slots) == 1:  # deepspeed takes a single host for this one, after asking it by ssh
        if is_this_host(next(iter(slots))):
            command += ["--no_ssh_check"]
            server_addr = server_addr or "127.0.0.1"
        else:
            command += ["--force_multi"]
    command += ["--no_local_rank"]
    if server_addr:
        command += ["--master_addr", server_addr]
    if server_port:
        command += ["--master_port", str(server_port)]
    return [*command, "--module", "lobra.cli", name, *arguments]


def run_launcher(command: Sequence[str], on_signal: Callable[[int], None] | None = None) -> int:
    """Run the launcher's command until it and what it started on this host have ended.

    It runs in a session of its own, so that a Ctrl-C does not reach its ranks by several ways.
    The first SIGINT or SIGTERM is passed on to the launcher, and to its children if it ends without
    them, or to ``on_signal`` alone, which ends the ranks; another one after `SAME_REQUEST_S` kills
    all of them.

    Returns
    -------
    128 + the first signal received (130, 143), else the launcher's exit code (128 + n if
    signal n killed it).
    """
    received: list[tuple[int, float]] = []
    launcher: subprocess.Popen[bytes] | None = None

    def handle(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not received:
            received.append((number, now))
            if on_signal is not None:
                on_signal(number)
            elif launcher is not None:
                launcher.send_signal(number)
        elif launcher is not None and now - received[0][1] >= SAME_REQUEST_S:
            _signal_group(launcher.pid, signal.SIGKILL)

    with handled_by(handle):
        launcher = subprocess.Popen(list(command), start_new_session=True, env=_environment())
        if received and on_signal is None:  # before there was a launcher
            launcher.send_signal(received[0][0])
        code = launcher.wait()
        if received:
            # On one host deepspeed's launcher ends at once and leaves the ranks' parent behind.
            _signal_group(launcher.pid, received[0][0])
            while _group_lives(launcher.pid):
                time.sleep(POLL_S)
            return 128 + received[0][0]
        return code if code >= 0 else 128 - code


def _environment() -> dict[str, str]:
    """Return this process's environment, and in it what pdsh tells ssh.

    What is there already comes first, as the first value of an option counts.
    """
    name = "PDSH_SSH_ARGS_APPEND"
    return {**os.environ, name: f"{os.environ.get(name, '')} {SSH_OPTIONS}".strip()}


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_lives(group: int) -> bool:
    """Return whether the process group has a member that still runs.

    Ended processes that nobody has waited for yet do not count.
    """
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _parent, own = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                return True
    return False
