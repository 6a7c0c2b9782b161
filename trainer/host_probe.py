"""What a host says of itself: a process there answers what `lobra doctor` asks it by ssh.

A request is a line of JSON, a name and its arguments, on standard input; the answer is one on
standard output, behind a mark, since a host's shell may print lines of its own there. The process
ends with its input. It uses Python's standard library only, so that a host may lack all else.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lobra.common.version import installed_version

MARK = "lobra-host: "
PACKAGES = ("lobra", "torch", "deepspeed", "transformers")
CONNECT_S = 10.0  # to connect to a host, and to wait for what it sends
LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 28  # of a transfer that is timed
LONG_ENOUGH_S = 0.2  # for such a transfer
PINGS = 10
_GET_ADDRESS = 0x8915  # Linux's SIOCGIFADDR
_LENGTH = struct.Struct("!Q")

_listening: list[socket.socket] = []


def describe() -> dict[str, Any]:
    """Return the host's versions, its number of GPUs, and its addresses.

    `address` is the one that gloo has others connect to, `first_address` the one that DeepSpeed's
    launcher takes for the host's where it is told no other.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: installed_version(name) for name in PACKAGES}
    cards = Path("/proc/driver/nvidia/gpus")
    return {
        "versions": versions,
        "gpus": len(list(cards.iterdir())) if cards.is_dir() else 0,
        "address": gloo_address(),
        "first_address": _first_address(),
    }


def gloo_address() -> str:
    """Return the address that gloo takes: of GLOO_SOCKET_IFNAME, else of the host's name.

    Raises
    ------
    OSError
        There is no such interface, or it has no IPv4 address.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if interface:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            name = struct.pack("256s", interface.encode()[:15])
            try:
                found = fcntl.ioctl(any_socket.fileno(), _GET_ADDRESS, name)
            except OSError as error:
                raise OSError(f"GLOO_SOCKET_IFNAME={interface}: {error.strerror}") from error
        return socket.inet_ntoa(found[20:24])
    with contextlib.suppress(OSError):  # a name that nothing knows
        for family, kind, protocol, _, address in socket.getaddrinfo(
            platform.node(), None, type=socket.SOCK_STREAM
        ):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.bind(address)
                return str(address[0])
    return "127.0.0.1"


def _first_address() -> str | None:
    if shutil.which("hostname") is None:
        return None
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False)
    return next(iter(done.stdout.split()), None)


def clock() -> float:
    """Return the time here, in seconds since the epoch."""
    return time.time()


def model_digest(folder: str) -> str | None:
    """Return a digest of a model folder's names and sizes, None where there is no model."""
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return None
    files = [path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors")]
    sizes = sorted((path.name, path.stat().st_size) for path in files)
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def leave_mark(folder: str) -> str:
    """Make an empty file in a folder, or in what would hold it; return its path.

    Raises
    ------
    OSError
        It cannot be written there.
    """
    there = next(one for one in (Path(folder), *Path(folder).absolute().parents) if one.is_dir())
    descriptor, path = tempfile.mkstemp(prefix=".lobra-doctor-", dir=there)
    os.close(descriptor)
    return os.path.abspath(path)


def sees(path: str) -> bool:
    """Return whether there is such a file here."""
    with contextlib.suppress(OSError):  # network file systems remember what they lacked
        os.listdir(os.path.dirname(path))
    return os.path.exists(path)


def remove_mark(path: str) -> None:
    """Remove a file that `leave_mark` has made."""
    os.unlink(path)


def listen(address: str, port: int) -> int:
    """Begin to answer connections; return the port, which is free to choose if it is 0.

    Parameters
    ----------
    address
        Of this host; "" for all it has.
    port
        Of this host.

    Raises
    ------
    OSError
        The port is taken, or the address is not of this host.
    """
    if not address and socket.has_dualstack_ipv6():
        server = socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64
        )
    else:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, port), family=family, backlog=64)
    _listening.append(server)
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    return int(server.getsockname()[1])


def close() -> None:
    """Answer no connections any more."""
    while _listening:
        server = _listening.pop()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # ends its thread's waiting
        server.close()


def _serve(server: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_take, args=(connection,), daemon=True).start()


def _take(connection: socket.socket) -> None:
    """Answer every message, a length and so many bytes, with a byte."""
    room = memoryview(bytearray(LEAST_BYTES))
    with connection, contextlib.suppress(OSError):
        connection.settimeout(CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while head := connection.recv(_LENGTH.size, socket.MSG_WAITALL):
            (left,) = _LENGTH.unpack(head)
            while left > 0:
                count = connection.recv_into(room, min(left, len(room)))
                if not count:
                    return
                left -= count
            connection.sendall(b"\0")


def measure(address: str, port: int, transfers: bool) -> dict[str, float]:
    """Return how long a message to another host takes there and back, and its bytes a second.

    Parameters
    ----------
    address, port
        Of a host that listens.
    transfers
        Whether bytes a second are wanted.

    Raises
    ------
    OSError
        It cannot be reached.
    """
    with socket.create_connection((address, port), timeout=CONNECT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = {"round_trip_s": min(_sent_s(connection, 1) for _ in range(PINGS))}
        size, took_s = LEAST_BYTES, 0.0
        while transfers and took_s < LONG_ENOUGH_S and size <= MOST_BYTES:
            took_s = _sent_s(connection, size)
            found["bytes_per_s"] = size / took_s
            size *= 2
    return found


def _sent_s(connection: socket.socket, size: int) -> float:
    data = memoryview(bytes(min(size, LEAST_BYTES)))
    start = time.perf_counter()
    connection.sendall(_LENGTH.pack(size))
    for _ in range(size // len(data)):
        connection.sendall(data)
    if not connection.recv(1):
        raise ConnectionResetError("the other host closed the connection")
    return time.perf_counter() - start


REQUESTS: dict[str, Callable[..., Any]] = {
    request.__name__: request
    for request in (
        describe, clock, model_digest, leave_mark, sees, remove_mark, listen, close, measure
    )
}  # fmt: skip


def answer(lines: Iterable[str]) -> None:
    """Answer requests, {"value": ...} each, or {"error": a text} for what the system denies."""
    for line in lines:
        name, *arguments = json.loads(line)
        try:
            told: dict[str, Any] = {"value": REQUESTS[name](*arguments)}
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno and error.errno > 0:  # not so of names that do not resolve
                why = os.strerror(error.errno)
            told = {"error": why}
        sys.stdout.write(f"{MARK}{json.dumps(told)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    answer(sys.stdin)
