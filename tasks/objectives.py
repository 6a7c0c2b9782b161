"""What a task learns: each token by itself, or which of two answers, or whether one, is wanted.

All but ``supervised`` learn from examples of two sequences, next to each other in the data:

========  ====================================================  ==========
dpo       a chosen and a rejected answer (arXiv 2305.18290)     reference
cpo       the same (arXiv 2401.08417)
orpo      the same (arXiv 2403.07691)
kto       an answer, wanted or not, and one of another prompt   reference
          (arXiv 2402.01306)
========  ====================================================  ==========

The reference is the base model without any adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lobra.tasks.config import TaskConfig

SEQUENCES_OF_EXAMPLE = 2  # of every objective but supervised
SUPERVISED = "supervised"
#: The fields of a task that each objective has.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    SUPERVISED: (),
    "dpo": ("beta",),
    "cpo": ("beta", "cpo_alpha"),
    "orpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}
OBJECTIVES = tuple(PARAMETERS)
PAIRED = ("dpo", "cpo", "orpo")


@dataclass(frozen=True)
class Objective:
    """An objective of examples; the fields are those of the task."""

    kind: str
    beta: float
    cpo_alpha: float
    desirable_weight: float
    undesirable_weight: float

    @property
    def has_reference(self) -> bool:
        """Whether answers are compared with what the base model thinks of them."""
        return self.kind in ("dpo", "kto")

    @property
    def learns_prompts(self) -> bool:
        """Whether the prompts of chosen answers are learned too, as TRL's ORPO does."""
        return self.kind == "orpo"

    @property
    def token_weight(self) -> float:
        """What the mean loss of the chosen answers' tokens counts for."""
        return {"cpo": self.cpo_alpha, "orpo": 1.0}.get(self.kind, 0.0)


def objective_of(task: TaskConfig) -> Objective | None:
    """Return a task's objective of examples; None if it is supervised."""
    if task.objective == SUPERVISED:
        return None
    return Objective(
        task.objective, task.beta, task.cpo_alpha, task.desirable_weight, task.undesirable_weight
    )
