"""The hosts that a host file gives a deployment: which of them are there when it starts again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lobra.common.errors import ConfigError, Problems
from lobra.common.words import counted
from lobra.layout.placement import is_placeable
from lobra.layout.plan import Plan
from lobra.trainer.host_file import (
    first_slots,
    is_this_host,
    names_of_this_host,
    read_host_file,
)
from lobra.trainer.remote_host import answers, why_silent

T = TypeVar("T")

ASK_AGAIN_S = 10.0  # of a host that does not answer
ASKED_AT_ONCE = 64  # hosts, before the first start

log = logging.getLogger(__name__)


@dataclass
class RunHosts:
    """Hosts, of which some may be lost for now.

    Attributes
    ----------
    file
        The host file.
    listed
        Each host's slots as the file had them when it was read, once: DeepSpeed's launcher is told
        which of these to use.
    await_s
        How long one that does not answer is waited for before the others go on without it.
    lost
        Those that the others have gone on without.
    """

    file: Path
    listed: Mapping[str, int]
    await_s: float
    lost: frozenset[str] = frozenset()

    @classmethod
    def read(cls, file: Path, await_s: float) -> RunHosts:
        """Return the hosts of a host file; ConfigError if it has mistakes."""
        slots = read_host_file(file)
        Problems(names_of_this_host(slots)).prefixed(f"{file}: ").raise_if_any()
        return cls(file, slots, await_s)

    @property
    def slots(self) -> dict[str, int]:
        """The slots of each host that is not lost."""
        return self._without(self.lost)

    def chosen(self, num_gpus: int) -> dict[str, int]:
        """Return how many ranks each host takes.

        Raises
        ------
        ConfigError
            The hosts have fewer slots.
        """
        if sum(self.slots.values()) < num_gpus:
            raise ConfigError(
                f"{self.file}: {sum(self.slots.values())} slots on {len(self.slots)} hosts, the "
                f"plan needs {num_gpus}"
            )
        return first_slots(self.slots, num_gpus)

    def check_answers(self, num_gpus: int) -> None:
        """Ask the hosts that ranks are to be on, as the launcher will reach them.

        Raises
        ------
        ConfigError
            With every one that does not answer: before a first start it is no lost one.
        """
        names = list(self.chosen(num_gpus))
        if len(names) == 1 and is_this_host(names[0]):
            return  # which the launcher does not reach by ssh
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            reasons = dict(zip(names, pool.map(why_silent, names), strict=True))
        Problems(
            f"{self.file}: host {name} does not answer by ssh: {why}; `ssh {name} true` must work "
            f"without a password"
            for name, why in reasons.items()
            if why is not None
        ).raise_if_any()

    def after_failure(
        self, plan: Plan, plan_anew: Callable[[Mapping[str, int], str], T]
    ) -> T | None:
        """Wait until there are hosts to go on on; return another plan, None for the present one.

        Where hosts that ranks are on are not back in time, slots to spare take their ranks; where
        there are too few, another plan is for the hosts that are left. So it is for all where one
        that was lost is back. Without such a plan hosts are waited for as long as it takes, as the
        first one always is: all that must not be lost is there.

        Parameters
        ----------
        plan
            The present one.
        plan_anew
            Returns a plan for hosts, given with their slots, and why: which are lost or back.
            ConfigError where there is none.
        """
        needed = frozenset(first_slots(self.slots, plan.num_gpus))
        silent = self._silent_after(self.await_s, needed)
        left, is_missed = self._without(silent), bool(silent & needed)
        is_back = not self.lost <= silent
        if (is_missed and not _is_enough(left, plan)) or (is_back and not is_missed):
            try:
                found = plan_anew(left, self._news(silent))
            except ConfigError as error:
                if is_missed:
                    log.warning("%s; no plan for the others: %s", self._news(silent), error)
                silent = self._silent_after(math.inf, needed)
            else:
                self.lost = silent
                return found
        self.lost = silent
        return None

    def _silent_after(self, await_s: float, needed: frozenset[str]) -> frozenset[str]:
        """Return the hosts that do not answer: none that is needed, or time is over.

        It is not as long as the first host, which is always needed, is among them.
        """
        until, told = time.monotonic() + await_s, frozenset[str]()
        while True:
            silent = frozenset(
                name for name in self.listed if not (is_this_host(name) or answers(name))
            )
            missing, left_s = silent & needed, until - time.monotonic()
            if not missing or (left_s <= 0 and next(iter(self.listed)) not in silent):
                return silent
            if missing != told:
                names = ", host ".join(sorted(missing))
                log.warning("waiting for what does not answer by ssh: host %s", names)
            told = missing
            time.sleep(min(ASK_AGAIN_S, left_s) if left_s > 0 else ASK_AGAIN_S)

    def _without(self, names: Iterable[str]) -> dict[str, int]:
        gone = set(names)
        return {name: size for name, size in self.listed.items() if name not in gone}

    def _news(self, silent: frozenset[str]) -> str:
        """Return which hosts are lost, and which are back."""
        return ", ".join(
            f"host {name} ({counted(size, 'GPU')}) is {'lost' if name in silent else 'back'}"
            for name, size in self.listed.items()
            if name in silent | self.lost
        )


def _is_enough(slots: Mapping[str, int], plan: Plan) -> bool:
    """Return whether hosts have room for a plan's ranks."""
    return sum(slots.values()) >= plan.num_gpus and is_placeable(plan, tuple(slots.values()))
