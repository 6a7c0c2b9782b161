"""Host files, in DeepSpeed's format: which machines there are, and how many ranks each takes."""

from __future__ import annotations

import contextlib
import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from lobra.common.documents import read_text
from lobra.common.errors import Problems, show
from lobra.common.models import HostName, refusal

_SLOTS = re.compile("slots=0*([1-9][0-9]{0,3})")


def read_host_file(path: Path) -> dict[str, int]:
    """Return {host: slots} of a DeepSpeed host file (`name slots=8`).

    Raises
    ------
    ConfigError
        With every line that is not of that form.
    """
    slots: dict[str, int] = {}
    problems = Problems()
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split("#")[0].split()
        if not words:
            continue
        host, count = words[0], _SLOTS.fullmatch(words[1]) if len(words) == 2 else None
        if count is None:
            problems.add(f"{path}:{number}: {show(line)} is not of the form 'host slots=8'")
        elif wanted := refusal(HostName, host):
            problems.add(f"{path}:{number}: {show(host)}: want {wanted}")
        elif host in slots:
            problems.add(f"{path}:{number}: host {host!r} is listed twice")
        else:
            slots[host] = int(count[1])
    if not slots and not problems:
        problems.add(f"{path}: no host in it")
    problems.raise_if_any()
    return slots


def first_slots(slots: Mapping[str, int], count: int) -> dict[str, int]:
    """Return how many of the first `count` slots each host has; only hosts that have any."""
    chosen = {}
    for host, size in slots.items():
        if taken := min(size, count):
            chosen[host] = taken
        count -= taken
    return chosen


def names_of_this_host(slots: Mapping[str, int]) -> list[str]:
    """Return what is wrong with hosts of which several are this machine (empty: nothing)."""
    names = [name for name in slots if is_this_host(name)]
    if len(names) < 2:
        return []
    return [f"hosts {', '.join(names)} are one machine, this one: list it once, with all its slots"]


def is_this_host(name: str) -> bool:
    """Return whether a host's name means this machine: one of its addresses can be bound here."""
    if name in ("localhost", platform.node()):
        return True
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:  # unknown: the launcher will say so
        return False
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
            tried.bind(address)
            return True
    return False
