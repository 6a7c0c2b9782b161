from __future__ import annotations

from dataclasses import replace

import numpy as np

from lobra.planner.packed.bound import prices_of
from lobra.planner.packed.step_work import StepWork

TRIED = 4


def without_long_bubbles(
    work: StepWork, prices: np.ndarray, step_time_s: float
) -> tuple[StepWork, np.ndarray]:
    best = work, prices, None
    most = int(work.counts.sum())
    for kind, alike in enumerate(work.alike):
        others = np.delete(work.alone_s, kind, axis=0).min(axis=0, initial=np.inf)
        free = np.isfinite(others)  # elsewhere too
        own = np.isfinite(work.parts_s[kind])
        if not alike.bubbles or not free[own][-1]:
            continue
        _, usual_s = alike.held_s(step_time_s, most)
        longest = int(np.flatnonzero(own)[-1])
        first = int(np.searchsorted(work.alone_s[kind][own], usual_s))
        if first > longest:
            continue
        tried = np.unique(np.linspace(max(first - 1, 0), longest, TRIED).astype(int))
        found = []
        for cap in tried.tolist():
            parts_s = work.parts_s.copy()
            parts_s[kind, cap + 1 :] = np.inf
            more_s = alike.bubbles * max(0.0, float(work.alone_s[kind, cap]) - usual_s)
            one = replace(work, parts_s=parts_s)
            own_prices = prices_of(one, step_time_s)
            value = float(one.counts @ (own_prices[:, None] * one.parts_s).min(axis=0))
            t = step_time_s
            low, high = step_time_s, 1.5 * step_time_s
            for _ in range(12):
                t = 0.5 * (low + high)
                held = one.held_s(t)
                held[kind] -= len(alike.replicas) * more_s * held[kind] / (len(alike.replicas) * t)
                if own_prices @ held < value:
                    low = t
                else:
                    high = t
            found.append((high, cap, one, own_prices))
        t, cap, work, prices = min(found, key=lambda x: x[0])
    return work, prices
