"""The fleet: the candidate layouts and the GPUs that plans are made of.

A plan is known here by its replicas: int64 [candidates], how many of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lobra.layout.placement import is_placeable
from lobra.layout.plan import Plan, ReplicaGroup, make_plan
from lobra.planner.candidates import Candidate

EXCHANGED = (1, 2, 4)  # times as many GPUs as both layouts' replicas fill


@dataclass(frozen=True)
class Fleet:
    """What there is to deploy, and on what."""

    candidates: tuple[Candidate, ...]
    num_gpus: int
    gpus_per_node: int = 8

    @cached_property
    def sizes(self) -> np.ndarray:
        """int64 [candidates]: GPUs of one replica of each."""
        return np.array([candidate.layout.num_gpus for candidate in self.candidates])

    @cached_property
    def max_tokens(self) -> np.ndarray:
        """int64 [candidates]: the longest sequence that each holds."""
        return np.array([candidate.max_tokens for candidate in self.candidates])

    def plan(self, replicas: np.ndarray) -> Plan:
        """Return the plan with so many replicas of each candidate."""
        return make_plan(
            [
                ReplicaGroup(candidate.layout, int(number), candidate.max_tokens)
                for candidate, number in zip(self.candidates, replicas, strict=True)
                if number > 0
            ]
        )

    def replicas_of(self, plan: Plan) -> np.ndarray:
        """Return how many replicas of each candidate a plan has."""
        groups = {(group.layout, group.max_tokens): group.replicas for group in plan.groups}
        numbers = [groups.get((each.layout, each.max_tokens), 0) for each in self.candidates]
        return np.array(numbers, dtype=np.int64)

    def can_place(self, plan: Plan) -> bool:
        """Return whether the plan fits the GPUs and the nodes."""
        return plan.num_gpus <= self.num_gpus and is_placeable(plan, self.gpus_per_node)

    def homogeneous(self, longest: int) -> Iterator[np.ndarray]:
        """Yield, of each candidate that holds ``longest`` tokens, as many as can be placed."""
        for index in np.flatnonzero(self.max_tokens >= longest).tolist():
            replicas = np.zeros(len(self.candidates), dtype=np.int64)
            replicas[index] = self.num_gpus // self.sizes[index]
            while replicas[index] and not self.can_place(self.plan(replicas)):
                replicas[index] -= 1
            if replicas[index]:
                yield replicas

    def filled(self, replicas: np.ndarray) -> np.ndarray:
        """Use idle GPUs for more replicas: first of layouts already there, the largest first."""
        replicas = replicas.copy()
        left = self.num_gpus - int(replicas @ self.sizes)
        order = np.lexsort((-self.sizes, replicas == 0))
        for index in order.tolist():
            number = left // int(self.sizes[index])
            replicas[index] += number
            left -= number * int(self.sizes[index])
        return replicas

    def rounded(self, replicas: np.ndarray, longest: int) -> np.ndarray:
        """Return whole replicas on about all GPUs, near to divided ones, float64 [candidates].

        One that holds ``longest`` tokens is among them.
        """
        whole = np.floor(np.maximum(replicas, 0.0)).astype(np.int64)
        holders = np.flatnonzero(self.max_tokens >= longest)
        if not whole[holders].any():
            whole[holders[replicas[holders].argmax()]] += 1
        order = np.argsort(whole - replicas, kind="stable")
        for index in order.tolist():
            left = self.num_gpus - int(whole @ self.sizes)
            whole[index] += whole[index] < replicas[index] and self.sizes[index] <= left
        for index in order[::-1].tolist():  # the holder may be too much
            if index not in holders:
                over = max(0, int(whole @ self.sizes) - self.num_gpus)
                whole[index] -= min(whole[index], -(-over // int(self.sizes[index])))
        return self.filled(whole)

    def placed(self, replicas: np.ndarray, longest: int) -> np.ndarray | None:
        """Return the plan, or what is left of it when replicas go until it can be placed.

        Those with the most shards go first; None if what is left does not hold ``longest`` tokens.
        """
        left = replicas
        order = np.argsort([-c.layout.tp for c in self.candidates], kind="stable")
        while not self.can_place(self.plan(left)):
            for index in order.tolist():
                fewer = left.copy()
                fewer[index] -= 1
                if left[index] and (self.max_tokens[fewer > 0] >= longest).any():
                    left = fewer
                    break
            else:
                return None
        return left

    def neighbours(self, replicas: np.ndarray) -> Iterator[np.ndarray]:
        """Yield plans with one layout's replicas exchanged for as many GPUs of another."""
        for source in np.flatnonzero(replicas).tolist():
            for target in range(len(self.sizes)):
                if target == source:
                    continue
                step = int(np.lcm(self.sizes[source], self.sizes[target]))
                for times in EXCHANGED:
                    out = times * step // self.sizes[source]
                    if out <= replicas[source]:
                        changed = replicas.copy()
                        changed[source] -= out
                        changed[target] += times * step // self.sizes[target]
                        yield changed
