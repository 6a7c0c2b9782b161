"""What the service has done since it was started: counted by the coordinator, read by the page."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_LOSSES = 200  # of a model that are kept for its curve


@dataclass
class Tally:
    """Counts and sums.

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
    memory_bytes
        Of each rank, the most memory it had in use in the last order.
    losses
        Of each model the mean losses of its last requests, the latest last.
    """

    passes: int = 0
    pass_s: float = 0.0
    predicted_s: float = 0.0
    updates: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    busy_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    losses: dict[str, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=MOST_LOSSES))
    )


def as_prometheus(tally: Tally, waiting: dict[str, int], slots: int) -> str:
    """Return the tally in Prometheus's text format; ``waiting`` are each tenant's requests."""
    busy = {f'rank="{rank}"': value for rank, value in enumerate(tally.busy_s)}
    memory = {f'rank="{rank}"': value for rank, value in enumerate(tally.memory_bytes)}
    families: list[tuple[str, str, str, Mapping[str, float]]] = [
        ("passes_total", "counter", "Passes of data over the replicas.", {"": tally.passes}),
        ("pass_seconds_total", "counter", "What they took.", {"": tally.pass_s}),
        (
            "predicted_pass_seconds_total", "counter", "What was predicted for them.",
            {"": tally.predicted_s},
        ),
        ("updates_total", "counter", "Optimiser steps.", {"": tally.updates}),
        ("tokens_total", "counter", "Tokens computed.", _by_tenant(dict(tally.tokens))),
        ("busy_seconds_total", "counter", "What a rank computed.", busy),
        ("memory_bytes", "gauge", "Most memory of a rank in its last order.", memory),
        ("waiting_requests", "gauge", "Requests without a result.", _by_tenant(waiting)),
        ("slots_used", "gauge", "Models that are on the ranks.", {"": slots}),
    ]  # fmt: skip
    lines = []
    for name, kind, text, values in families:
        lines += [f"# HELP lobra_{name} {text}", f"# TYPE lobra_{name} {kind}"]
        for label, value in values.items():
            lines.append(f"lobra_{name}{{{label}}} {value}" if label else f"lobra_{name} {value}")
    return "\n".join(lines) + "\n"


def _by_tenant(values: dict[str, int]) -> dict[str, float]:
    return {f'tenant="{name}"': value for name, value in values.items()}
