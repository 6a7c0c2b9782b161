"""Machines on one machine: namespaces with a network, a name and folders of their own."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMESPACES = ("--net", "--uts", "--mount")
INTERFACE = "eth0"


@dataclass(frozen=True)
class Node:
    """A node, which is there for as long as its process `pid`."""

    name: str
    address: str
    pid: int

    def command(self, words: Sequence[str], folder: Path | None = None) -> list[str]:
        """Return the command that runs another on the node."""
        # Not nsenter's --wd: from there, what is mounted on the node alone would not be seen.
        script = f"cd {shlex.quote(str(folder or Path.cwd()))} && exec {shlex.join(words)}"
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "bash", "-c", script]

    def run(self, *words: str) -> None:
        """Run a command there, which must succeed."""
        done = subprocess.run(self.command(words), capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{shlex.join(words)}: {done.stderr.strip()}")

    def processes(self) -> list[int]:
        """Return the processes on the node, but for the one that it is there for."""
        own = os.readlink(f"/proc/{self.pid}/ns/net")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if os.readlink(process / "ns/net") == own:
                    found.append(int(process.name))
        return [pid for pid in found if pid != self.pid]

    def pull_the_cable(self) -> None:
        """Cut the node off: nothing is sent or refused any more."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def plug_it_in(self) -> None:
        """Undo that."""
        self.run("ip", "link", "set", INTERFACE, "up")

    def hide(self, folder: Path) -> None:
        """Give the node a folder of its own, empty, in place of one that all see."""
        self.run("mount", "-t", "tmpfs", "none", str(folder))


@contextmanager
def two_nodes(folder: Path, names: Mapping[str, str]) -> Iterator[tuple[Node, Node]]:
    """Make two nodes that a cable joins; skip the test where that is not allowed.

    Parameters
    ----------
    folder
        Where their /etc/hosts is kept.
    names
        Of each, the other names that its address has.
    """
    table = folder / "hosts-of-nodes"
    addresses = [f"10.77.0.{number}" for number in range(1, 1 + len(names))]
    lines = ["127.0.0.1 localhost"]
    lines += [
        f"{address} {name} {more}"
        for address, (name, more) in zip(addresses, names.items(), strict=True)
    ]
    table.write_text("\n".join(lines) + "\n")
    holders: list[subprocess.Popen[bytes]] = []
    try:
        try:
            nodes = []
            for name, address in zip(names, addresses, strict=True):
                holder = subprocess.Popen(
                    ["unshare", *NAMESPACES, "bash", "-c", "echo made; exec sleep infinity"],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )  # fmt: skip
                holders.append(holder)
                assert holder.stdout and holder.stderr
                if not holder.stdout.readline():
                    raise OSError(holder.stderr.read().decode().strip())
                nodes.append(Node(name, address, holder.pid))
            _join(*nodes)
            for node in nodes:
                node.run("bash", "-c", f"echo {node.name} > /proc/sys/kernel/hostname")
                node.run("mount", "--bind", str(table), "/etc/hosts")
                node.hide(Path("/dev/shm"))
        except OSError as error:
            pytest.skip(f"no namespaces for nodes of their own here: {error}")
        yield nodes[0], nodes[1]
    finally:
        for holder in holders:  # with it go its namespaces and what is in them
            holder.kill()
            holder.communicate()


def _join(one: Node, other: Node) -> None:
    subprocess_run = ["ip", "link", "add", INTERFACE, "netns", str(one.pid), "type", "veth"]
    subprocess_run += ["peer", "name", INTERFACE, "netns", str(other.pid)]
    done = subprocess.run(subprocess_run, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    for node in (one, other):
        node.run("ip", "link", "set", "lo", "up")
        node.run("ip", "addr", "add", f"{node.address}/24", "dev", INTERFACE)
        node.run("ip", "link", "set", INTERFACE, "up")


def write_script(path: Path, text: str) -> None:
    """Write a program of bash that can be run."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def write_ssh(folder: Path, nodes: Sequence[Node]) -> None:
    """Write `ssh` that runs commands on nodes, and `pdsh` where there is none.

    They are for a PATH that begins with the folder. A node that is cut off is not reached.
    """
    cases = "\n".join(f"  {node.name}|{node.address}) pid={node.pid} ;;" for node in nodes)
    write_script(
        folder / "ssh",
        f"""
while [[ $1 == -* ]]; do
  case $1 in -o | -l | -p) shift 2 ;; *) shift ;; esac
done
case $1 in
{cases}
  *) echo "ssh: Could not resolve hostname $1: Name or service not known" >&2; exit 255 ;;
esac
if ! nsenter --target "$pid" --net ip link show {INTERFACE} up | grep -q .; then
  echo "ssh: connect to host $1 port 22: No route to host" >&2
  exit 255
fi
shift
exec nsenter --target "$pid" {" ".join(NAMESPACES)} bash -c "cd /; $*"
""",
    )
    if shutil.which("pdsh"):
        return
    write_script(
        folder / "pdsh",
        """
while [[ $1 == -* ]]; do
  case $1 in -w) hosts=$2; shift 2 ;; -f) shift 2 ;; *) shift ;; esac
done
words="$*" number=0 worst=0
for host in ${hosts//,/ }; do
  ssh "$host" "${words//%n/$number}" & number=$((number + 1))
done
for job in $(jobs -p); do
  wait "$job" || { code=$?; ((code > worst)) && worst=$code; }
done
exit $worst
""",
    )


def clean_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without a launcher's variables, and with some more."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**kept, **more}
