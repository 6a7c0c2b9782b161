"""`lobra doctor --host-file`: whether hosts reach each other, and have what ranks need there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lobra.commands.finding import LACKS, NOTE, OK, Finding
from lobra.common.options import LauncherOptions
from lobra.trainer.host_file import is_this_host, names_of_this_host
from lobra.trainer.remote_host import Denied, NoAnswer, RemoteHost, Unreachable

DEFAULT_PORT = 29500  # DeepSpeed's launcher's
CLOCK_S = 2.0  # by which clocks may differ
EXAMPLE_BYTES = 100e6  # of adapters, where the tasks are not known
SLOW_S, SLOW_SHARE = 10.0, 0.1  # an exchange that takes more of a step, 10 s if it is not known


@dataclass(frozen=True)
class HostNeeds:
    """What a run needs of its hosts.

    Attributes
    ----------
    model_folder
        The base model, None if it is not known.
    output_dir
        The run's folder, None if it is not known.
    adapter_bytes
        Of all tasks' adapters, None if they are not known.
    num_ranks, step_time_s
        Of the plan; None if it is not known.
    """

    model_folder: Path | None = None
    output_dir: Path | None = None
    adapter_bytes: float | None = None
    num_ranks: int | None = None
    step_time_s: float | None = None


@dataclass(frozen=True)
class _Host:
    """A host that answers, and what it says of itself."""

    remote: RemoteHost
    about: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.remote.name

    @property
    def address(self) -> str:
        """What it has other hosts connect to."""
        return str(self.about["address"])


def host_findings(
    slots: Mapping[str, int], launcher: LauncherOptions, needs: HostNeeds
) -> Iterator[Finding]:
    """Yield what was found on the hosts of a host file, and between them."""
    if len(slots) > 1 and shutil.which("pdsh") is None:
        text = "not installed; deepspeed's launcher starts ranks on several hosts with it"
        yield Finding(LACKS, "pdsh", text)
    for problem in names_of_this_host(slots):
        yield Finding(LACKS, "host file", problem)
    by_ssh = len(slots) > 1 or not is_this_host(next(iter(slots)))
    if by_ssh and shutil.which("ssh") is None:
        yield Finding(LACKS, "ssh", "not installed; hosts are reached with it")
        return
    with ExitStack() as stack:
        started = [
            stack.enter_context(RemoteHost(name, by_ssh=by_ssh, env_file=launcher.env_file))
            for name in slots
        ]
        hosts = []
        for remote in started:
            try:
                hosts.append(_Host(remote, remote.ask("describe")))
            except Unreachable as error:
                text = f"no answer: {error}; see that `ssh {remote.name} true` works without a "
                text += "password, and that the project lies at the same path there"
                yield Finding(LACKS, f"host {remote.name}", text)
            except Denied as error:
                yield Finding(LACKS, f"host {remote.name}", str(error))
        for host in hosts:
            yield _slots(host, slots[host.name])
        try:
            yield from _versions(hosts)
            yield from _clocks(hosts)
            yield from _folders(hosts, needs)
            if len(slots) > 1 and hosts and hosts[0].name == next(iter(slots)):
                yield from _between(hosts, launcher, needs)
        except NoAnswer as error:
            text = f"does not go on answering: {error}; ask again"
            yield Finding(LACKS, f"host {error.host}", text)


def _slots(host: _Host, count: int) -> Finding:
    gpus = host.about["gpus"]
    subject, text = f"host {host.name}", f"{count} slots, {gpus} GPUs, at {host.address}"
    if 0 < gpus < count:
        return Finding(LACKS, subject, f"{text}: want at most as many slots as GPUs")
    return Finding(OK if gpus else NOTE, subject, text if gpus else f"{text}: ranks are processes")


def _versions(hosts: Sequence[_Host]) -> Iterator[Finding]:
    """Compare versions with the first host's."""
    alike = True
    for host in hosts[1:]:
        for package, version in host.about["versions"].items():
            expected = hosts[0].about["versions"][package]
            if version != expected:
                alike = False
                text = f"{version} on {host.name}, {expected} on {hosts[0].name}; install the same"
                yield Finding(LACKS, package, text)
    if alike and len(hosts) > 1:
        compared = ", ".join(hosts[0].about["versions"])
        yield Finding(OK, "versions", f"the same on all hosts: {compared}")


def _clocks(hosts: Sequence[_Host]) -> Iterator[Finding]:
    """Compare clocks with this machine's, as exactly as an answer is fast."""
    ahead = {}
    for host in hosts:
        begin = time.time()
        theirs = host.remote.ask("clock")
        ahead[host.name] = theirs - (begin + time.time()) / 2
    for name, seconds in ahead.items():
        if abs(seconds) > CLOCK_S:
            way = "ahead of" if seconds > 0 else "behind"
            text = f"{abs(seconds):.0f} s {way} this machine's; have NTP set it (chrony, timesyncd)"
            yield Finding(LACKS, f"clock of {name}", text)
    if ahead and max(map(abs, ahead.values())) <= CLOCK_S:
        most = max(map(abs, ahead.values()))
        yield Finding(OK, "clocks", f"within {max(most, 0.01):.2f} s of this machine's")


def _folders(hosts: Sequence[_Host], needs: HostNeeds) -> Iterator[Finding]:
    if needs.model_folder is not None:
        folder = str(needs.model_folder.resolve())
        digests = {host.name: host.remote.ask("model_digest", folder) for host in hosts}
        lacking = [name for name, digest in digests.items() if digest is None]
        if lacking:
            text = f"not on {', '.join(lacking)}: {folder}; it must lie there, at the same path"
            yield Finding(LACKS, "weights", text)
        elif len(set(digests.values())) > 1:
            other = [name for name in digests if digests[name] != digests[hosts[0].name]]
            text = f"{folder} has other files on {', '.join(other)} than on {hosts[0].name}; "
            yield Finding(LACKS, "weights", f"{text}copy it anew")
        elif digests:
            yield Finding(OK, "weights", "there on all hosts")
    if needs.output_dir is not None and hosts:
        yield _output(hosts, needs.output_dir)


def _output(hosts: Sequence[_Host], folder: Path) -> Finding:
    """Have the first host write into a folder, and the others look for what it wrote."""
    writer = hosts[0]
    try:
        mark = writer.remote.ask("leave_mark", str(folder))
    except Denied as error:
        text = f"{folder}: {writer.name} cannot write there ({error}); choose another"
        return Finding(LACKS, "--output-dir", text)
    try:
        blind = [host.name for host in hosts[1:] if not host.remote.ask("sees", mark)]
    finally:
        writer.remote.ask("remove_mark", mark)
    if not blind:
        return Finding(OK, "--output-dir", f"{folder}: shared by all hosts")
    text = (
        f"{folder}: not shared with {', '.join(blind)}; {writer.name}, the host of rank 0, has all"
    )
    return Finding(NOTE, "--output-dir", text)


def _between(
    hosts: Sequence[_Host], launcher: LauncherOptions, needs: HostNeeds
) -> Iterator[Finding]:
    """See that ranks can meet on the first host, and what the links to it are worth."""
    first, *others = hosts
    port = launcher.server_port or DEFAULT_PORT
    address = launcher.server_addr or first.about["first_address"] or first.address
    yield from _rendezvous(first, others, address, port)
    known = []
    for host in hosts:
        if host.address.startswith("127.") or host.address == "::1":
            text = f"its name leads to {host.address}, where others cannot reach it; name the "
            text += "interface that joins the hosts: GLOO_SOCKET_IFNAME=eth0 in --env-file"
            yield Finding(LACKS, f"address of {host.name}", text)
        else:
            known.append(host)
    if first in known:
        links = []
        for host in known[1:]:
            try:
                links.append(_link(first, host))
            except Denied as error:
                text = f"they do not reach each other at {first.address} and {host.address} "
                text += f"({error}); open the firewall for all ports, or set GLOO_SOCKET_IFNAME"
                yield Finding(LACKS, f"link {first.name}-{host.name}", text)
                continue
            finally:
                first.remote.ask("close")
                host.remote.ask("close")
            text = f"{links[-1]['bytes_per_s'] / 1e6:,.0f} MB/s over one TCP connection, "
            text += f"{links[-1]['round_trip_s'] * 1e3:.2f} ms there and back"
            yield Finding(OK, f"link {first.name}-{host.name}", text)
        if links:
            yield _exchange(links, needs, len(hosts))


def _rendezvous(
    first: _Host, others: Sequence[_Host], address: str, port: int
) -> Iterator[Finding]:
    """See that the port where ranks meet is free, and that all hosts reach it."""
    place = f"{address}:{port}"
    try:
        first.remote.ask("listen", "", port)
    except Denied as error:
        text = f"{port} on {first.name}: {error}; give another by --server-port"
        yield Finding(LACKS, "port", text)
        return
    reached = True
    for host in others:
        try:
            host.remote.ask("measure", address, port, False)
        except Denied as error:
            reached = False
            text = f"{host.name} does not reach {first.name} at {place} ({error}); open the "
            text += "firewall, or give an address that it knows by --server-addr"
            yield Finding(LACKS, "port", text)
    if reached:
        yield Finding(OK, "port", f"{place} is free, and all hosts reach it")
    first.remote.ask("close")


def _link(first: _Host, other: _Host) -> dict[str, float]:
    """Return how fast two hosts reach each other at the addresses their ranks give.

    Raises
    ------
    Denied
        One does not reach the other.
    """
    there = other.remote.ask("listen", other.address, 0)
    first.remote.ask("measure", other.address, there, False)
    here = first.remote.ask("listen", first.address, 0)
    found: dict[str, float] = other.remote.ask("measure", first.address, here, True)
    return found


def _exchange(links: Sequence[Mapping[str, float]], needs: HostNeeds, num_hosts: int) -> Finding:
    """Say what a step's exchange of adapters takes, round a ring with the slowest of the links.

    Gradients go round once and new weights once; each host sends (n - 1) / n of them in each.
    """
    known = needs.adapter_bytes is not None
    num_bytes = needs.adapter_bytes if needs.adapter_bytes is not None else EXAMPLE_BYTES
    turns = 2 * ((needs.num_ranks or num_hosts) - 1)
    latency_s = max(link["round_trip_s"] for link in links) / 2
    slowest = min(link["bytes_per_s"] for link in links)
    took_s = 2 * (num_hosts - 1) / num_hosts * num_bytes / slowest + turns * latency_s
    whose = f"the tasks' {num_bytes / 1e6:,.0f} MB of adapters" if known else "100 MB of adapters"
    text = f"{whose} take about {took_s:.2g} s of a step over TCP"
    if needs.step_time_s:
        text += f" (the plan's takes {needs.step_time_s:.3g} s)"
    is_slow = took_s > SLOW_SHARE * (needs.step_time_s or SLOW_S)
    return Finding(NOTE if is_slow else OK, "exchange", f"{text}; NCCL may be faster")
