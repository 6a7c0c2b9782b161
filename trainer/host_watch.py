"""The watch over hosts: rank 0's and each other one tell each other that they are there.

A host that has lost its power or its network closes no connection: ranks would wait for it for
hours. Here it is missed within half a minute, whatever the ranks compute meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import secrets
import socket
import threading
import time

import torch.distributed as dist

BEAT_S = 2.0  # between two signs of life
LOST_AFTER = 15  # of them missed in a row
CONNECT_S = 30.0
SIGN = b"."

log = logging.getLogger(__name__)


def watch_hosts(group: dist.ProcessGroup) -> None:
    """Begin to watch the world's hosts, by their first ranks. Collective.

    Where one is lost, rank 0's process ends, or if rank 0's host is the lost one all others' first
    ranks do; launchers then end the other ranks. A host that cannot be watched is warned of.

    Parameters
    ----------
    group
        Of all ranks, on CPUs.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    own = platform.node() if os.environ.get("LOCAL_RANK", "0") == "0" else None
    names: list[str | None] = [None] * world
    dist.all_gather_object(names, own, group=group)
    hosts = {speaker: name for speaker, name in enumerate(names) if speaker and name is not None}
    if not hosts:
        return
    listener = _listening() if rank == 0 else None
    token = secrets.token_bytes(16)
    offered = [(token, None if listener is None else listener.getsockname()[1])]
    dist.broadcast_object_list(offered, src=0, group=group)
    token, port = offered[0]
    connection = None
    if rank in hosts and port is not None:
        with contextlib.suppress(OSError):
            address = (os.environ["MASTER_ADDR"], port)
            connection = socket.create_connection(address, timeout=CONNECT_S)
            connection.sendall(token + rank.to_bytes(4))
    connected = [False] * world
    dist.all_gather_object(connected, connection is not None, group=group)
    if connection is not None:
        _watch(connection, f"of rank 0, {os.environ['MASTER_ADDR']},")
    if listener is None:
        return
    for speaker, other in _accepted(listener, token, sum(connected)):
        _watch(other, hosts.pop(speaker))
    if hosts:
        log.warning("not noticed if they are lost: hosts %s", ", ".join(hosts.values()))


def _listening() -> socket.socket:
    """Return a socket that others can connect to, of the kind of rank 0's address."""
    family = socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server(("", 0), family=family)


def _accepted(listener: socket.socket, token: bytes, count: int) -> list[tuple[int, socket.socket]]:
    """Return the connections of as many first ranks, which have sent the token and their number."""
    found: list[tuple[int, socket.socket]] = []
    with listener, contextlib.suppress(TimeoutError):
        listener.settimeout(CONNECT_S)
        while len(found) < count:
            connection, _ = listener.accept()
            connection.settimeout(CONNECT_S)
            said = connection.recv(len(token) + 4, socket.MSG_WAITALL)
            if secrets.compare_digest(said[: len(token)], token):
                found.append((int.from_bytes(said[len(token) :]), connection))
            else:  # a stranger
                connection.close()
    return found


def _watch(connection: socket.socket, host: str) -> None:
    thread = threading.Thread(target=_look_on, args=(connection, host), daemon=True)
    thread.start()


def _look_on(connection: socket.socket, host: str) -> None:
    """End this process when a host is lost; return when its rank has ended: launchers see that."""
    connection.settimeout(BEAT_S)
    missed = 0
    # Counted, not timed: this process may have been stopped, with all others.
    while missed < LOST_AFTER:
        try:
            connection.sendall(SIGN)
            if not connection.recv(1024):
                return
        except ConnectionError:
            return
        except OSError:  # nothing came, or there is no way to the host
            missed += 1
            continue
        missed = 0
        time.sleep(BEAT_S)
    silent_s = LOST_AFTER * BEAT_S
    log.critical("the host %s is lost: nothing was heard of it for %.0f s", host, silent_s)
    os._exit(1)
