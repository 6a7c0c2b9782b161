"""Which hosts of a launched run are there: each notes once a second, where ranks met, that it is.

Of the ranks of a host the first that is not stopped does so, and reads what the others note. A host
of which nothing new is heard is lost: it is down, or its network is, or none of its ranks is left.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from lobra.common.errors import MachineError
from lobra.model import heartbeat
from lobra.model.heartbeat import SLOW_PHASES
from lobra.model.rank_results import SIGNS_OF_LOSS
from lobra.model.watch import LOOK_S, STOPPED, process_state

SILENT_S = 60.0  # of a host in a step: a network that comes back sooner ends no run
SLOW_SILENT_S = 600.0  # in phases that files decide: a rank that waits for one may note nothing
BREAK_S = 5.0  # of silence that explains a broken connection
PATIENCE = timedelta(seconds=SILENT_S)

log = logging.getLogger(__name__)


class LostHost(MachineError):
    """A host of the run is gone."""


class HostWatch:
    """The hosts of a run, as this one hears of them."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        end_after_s: float | None,
        remedy: Callable[[], str] | None,
    ) -> None:
        """Begin to note that this host is there, and to end this process if another is not.

        Collective. Where all ranks are on one host, there is nothing to be watched.

        Parameters
        ----------
        group
            Of all ranks, on CPUs.
        end_after_s
            How long all may stand still in a step; a host is lost after half of that, and after
            `SILENT_S` at most.
        remedy
            Returns how one goes on, which the host of rank 0 says; None: who started the launcher
            does.
        """
        # Half, so that a lost host is called one before it is a rank that stands still.
        self._silent_s = min(SILENT_S, (end_after_s or math.inf) / 2)
        self._remedy = remedy
        known: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(known, (platform.node(), os.getpid()), group=group)
        self._ranks: dict[str, list[int]] = {}
        for rank, (host, _) in enumerate(known):
            self._ranks.setdefault(host, []).append(rank)
        self._own = platform.node()
        self._rank = dist.get_rank()
        self._pids = {rank: known[rank][1] for rank in self._ranks[self._own]}
        token = [secrets.token_hex(8)]
        dist.broadcast_object_list(token, src=0, group=group)
        self._keys = {host: f"{token[0]}/{host}" for host in self._ranks}
        self._heard: dict[str, str] = {}  # the last note of each host
        self._rounds = 0  # in which notes were read
        self._quiet_s = dict.fromkeys((*self._ranks, ""), 0.0)  # "": of the store
        self._is_noting = self._is_over = False
        if len(self._ranks) > 1:
            threading.Thread(target=self._look_on, name="hosts", daemon=True).start()

    def end(self) -> None:
        """Watch no more: from now on, hosts go as they like."""
        self._is_over = True

    def reason(self, error: BaseException) -> LostHost | None:
        """Return the lost host for which a connection broke, None if that is not why this failed.

        Of a host, the rank that notes tells it; the others leave it time to.
        """
        if len(self._ranks) == 1 or not any(sign in str(error) for sign in SIGNS_OF_LOSS):
            return None
        until = time.monotonic() + 2 * BREAK_S
        while time.monotonic() < until:
            if why := self.quiet():
                return LostHost(why)
            time.sleep(LOOK_S / 4)
        return None

    def quiet(self) -> str | None:
        """Return what is known of a host of which nothing is heard any more, None if all are."""
        return self._lost(BREAK_S)

    def _is_leader(self) -> bool:
        there = [rank for rank, pid in self._pids.items() if process_state(pid) not in STOPPED]
        return self._rank == min(there)

    def _look_on(self) -> None:
        heard, rounds = self._heard, self._rounds
        looked_s = time.monotonic()
        while not self._is_over:
            time.sleep(LOOK_S)
            if not self._is_noting and self._is_leader():
                self._is_noting = True
                self._quiet_s = dict.fromkeys(self._quiet_s, 0.0)
                threading.Thread(target=self._note, name="note", daemon=True).start()
            now = time.monotonic()
            # No more than what is between two looks: this process may have been stopped.
            passed_s, looked_s = min(now - looked_s, 2 * LOOK_S), now
            before, heard = heard, self._heard
            for host in self._ranks:
                is_new = heard.get(host) != before.get(host)
                self._quiet_s[host] = 0.0 if is_new else self._quiet_s[host] + passed_s
            self._quiet_s[""] = 0.0 if self._rounds != rounds else self._quiet_s[""] + passed_s
            rounds = self._rounds
            if (why := self._lost()) and not self._is_over:
                told = [why]
                if self._remedy is not None and 0 in self._pids:
                    told.append(self._remedy())
                log.critical("%s", "\n".join(told))
                os._exit(1)

    def _lost(self, least_s: float | None = None) -> str | None:
        """Return what is known of a host that is quiet for longer than it may be, None if none is.

        ``least_s`` is how long that is; by default it depends on what the host did last.
        """
        if not self._is_noting:
            return None
        if self._quiet_s[""] >= (least_s or self._limit_s(self._own)):
            return self._told(os.environ["MASTER_ADDR"], self._quiet_s[""])
        for host in self._ranks:
            if host != self._own and self._quiet_s[host] >= (least_s or self._limit_s(host)):
                return self._told(host, self._quiet_s[host])
        return None

    def _limit_s(self, host: str) -> float:
        phase = self._heard.get(host, SLOW_PHASES[0]).partition("/")[0]
        return max(self._silent_s, SLOW_SILENT_S) if phase in SLOW_PHASES else self._silent_s

    def _told(self, host: str, quiet_s: float) -> str:
        ranks = self._ranks.get(host, [])
        whose = f" with rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)}" if ranks else ""
        return (
            f"host {host}{whose} is lost: nothing is heard of it on {self._own} for "
            f"{quiet_s:.0f} s; it is down, or its network is, or none of its ranks is left"
        )

    def _note(self) -> None:
        """Note that this host is there, and read what others note, again and again.

        Where the network is down this stands still; that is seen in `_look_on`.
        """
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        while not self._is_over:
            with contextlib.suppress(RuntimeError):  # the connection broke: it is made anew
                store = dist.TCPStore(
                    address, port, is_master=False, timeout=PATIENCE, wait_for_workers=False
                )
                for key in self._keys.values():
                    store.compare_set(key, "", SLOW_PHASES[0])  # of hosts that noted nothing yet
                while not self._is_over:
                    store.set(self._keys[self._own], f"{heartbeat.phase()}/{secrets.token_hex(4)}")
                    notes = store.multi_get(list(self._keys.values()))
                    heard = zip(self._keys, notes, strict=True)
                    self._heard = {host: note.decode() for host, note in heard}
                    self._rounds += 1
                    time.sleep(LOOK_S)
            time.sleep(LOOK_S)


def _spans(ranks: Sequence[int]) -> str:
    """Return ranks in a row by the first and the last."""
    if len(ranks) > 1 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))
