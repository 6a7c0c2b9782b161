"""What the service has done since it was started: counted by the coordinator, read by the page."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RECENT_PASSES = 120  # that the page draws


@dataclass(frozen=True)
class PassRecord:
    """One pass.

    Attributes
    ----------
    pass_s, predicted_s
        Its time, and what was predicted for it (None: there is no time profile).
    busy_s, memory_bytes
        Of each rank, the seconds it computed, and the most memory it had in use.
    """

    pass_s: float
    predicted_s: float | None
    busy_s: tuple[float, ...]
    memory_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Activity:
    """What a `Tally` had counted at some time.

    Attributes
    ----------
    passes, pass_s, predicted_s
        Passes, their time, and what was predicted for them (0: no time profile).
    updates
        Optimiser steps.
    tokens
        Of each tenant, the tokens that were computed.
    busy_s
        Of each rank, the seconds it computed.
    recent
        The last passes, the latest last.
    """

    passes: int
    pass_s: float
    predicted_s: float
    updates: int
    tokens: Mapping[str, int]
    busy_s: Sequence[float]
    recent: Sequence[PassRecord]

    @property
    def memory_bytes(self) -> Sequence[int]:
        """Of each rank the most memory it had in use in the last pass."""
        return self.recent[-1].memory_bytes if self.recent else ()


class Tally:
    """Counts and sums. Its methods may be called from any thread.

    Attributes
    ----------
    passes, updates
        Passes and optimiser steps so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.passes = 0
        self.updates = 0
        self._pass_s = 0.0
        self._predicted_s = 0.0
        self._tokens: dict[str, int] = {}
        self._busy_s: list[float] = []
        self._recent: deque[PassRecord] = deque(maxlen=RECENT_PASSES)

    def note_pass(self, record: PassRecord, tokens: Mapping[str, int]) -> None:
        """Count a pass, of so many tokens of each tenant."""
        with self._lock:
            self.passes += 1
            self._pass_s += record.pass_s
            self._predicted_s += record.predicted_s or 0.0
            if len(self._busy_s) != len(record.busy_s):  # the first pass of these ranks
                self._busy_s = [0.0] * len(record.busy_s)
            self._busy_s = [sum(pair) for pair in zip(self._busy_s, record.busy_s, strict=True)]
            self._recent.append(record)
            for tenant, count in tokens.items():
                self._tokens[tenant] = self._tokens.get(tenant, 0) + count

    def note_update(self) -> None:
        """Count an optimiser step."""
        with self._lock:
            self.updates += 1

    def view(self) -> Activity:
        """Return what has been counted so far."""
        with self._lock:
            return Activity(
                self.passes,
                self._pass_s,
                self._predicted_s,
                self.updates,
                dict(self._tokens),
                tuple(self._busy_s),
                tuple(self._recent),
            )


def as_prometheus(activity: Activity, waiting: Mapping[str, int], slots: int, ranks: int) -> str:
    """Return all of it in Prometheus's text format.

    Parameters
    ----------
    activity
        What has been counted.
    waiting
        Each tenant's requests without a result.
    slots, ranks
        Slots that are used, and ranks that are there.
    """
    busy = {f'rank="{rank}"': value for rank, value in enumerate(activity.busy_s)}
    memory = {f'rank="{rank}"': value for rank, value in enumerate(activity.memory_bytes)}
    families: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("passes_total", "counter", "Passes of data over the replicas.", {"": activity.passes}),
        ("pass_seconds_total", "counter", "What they took.", {"": activity.pass_s}),
        (
            "predicted_pass_seconds_total", "counter", "What was predicted for them.",
            {"": activity.predicted_s},
        ),
        ("updates_total", "counter", "Optimiser steps.", {"": activity.updates}),
        ("tokens_total", "counter", "Tokens computed.", _by_tenant(activity.tokens)),
        ("busy_seconds_total", "counter", "What a rank computed.", busy),
        ("memory_bytes", "gauge", "Most memory of a rank in its last pass.", memory),
        ("waiting_requests", "gauge", "Requests without a result.", _by_tenant(waiting)),
        ("slots_used", "gauge", "Models that are on the ranks.", {"": slots}),
        ("ranks", "gauge", "Ranks that are there.", {"": ranks}),
    ]  # fmt: skip
    lines = []
    for name, kind, text, values in families:
        lines += [f"# HELP lobra_{name} {text}", f"# TYPE lobra_{name} {kind}"]
        for label, value in values.items():
            lines.append(f"lobra_{name}{{{label}}} {value}" if label else f"lobra_{name} {value}")
    return "\n".join(lines) + "\n"


def _by_tenant(values: Mapping[str, int]) -> dict[str, float]:
    return {f'tenant="{name}"': value for name, value in values.items()}
