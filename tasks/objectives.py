"""What a task learns: tokens, by themselves or by their advantages, or which answers are wanted.

Those that compare answers learn from examples of two sequences, next to each other in the data:

========  ====================================================  ==========
dpo       a chosen and a rejected answer (arXiv 2305.18290)     reference
cpo       the same (arXiv 2401.08417)
orpo      the same (arXiv 2403.07691)
kto       an answer, wanted or not, and one of another prompt   reference
          (arXiv 2402.01306)
cit       an answer to two wordings of a prompt (2402.11138)
========  ====================================================  ==========

The reference is the base model without any adapter. ``supervised`` and ``ppo`` (arXiv 1707.06347)
learn from sequences by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lobra.tasks.config import TaskConfig

SEQUENCES_OF_EXAMPLE = 2  # of objectives that compare answers
SUPERVISED, KTO, CIT, PPO = "supervised", "kto", "cit", "ppo"
#: The fields of a task that each objective has.
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    SUPERVISED: (),
    "dpo": ("beta",),
    "cpo": ("beta", "cpo_alpha"),
    "orpo": ("beta",),
    KTO: ("beta", "desirable_weight", "undesirable_weight"),
    CIT: ("contrast_weight", "temperature"),
    PPO: ("clip_low", "clip_high"),
}
OBJECTIVES = tuple(PARAMETERS)
PAIRED = ("dpo", "cpo", "orpo")
COMPARING = (*PAIRED, KTO, CIT)
#: How often tokens go through the model forward besides, on average: before a step's own pass. Half
#: of KTO's sequences are compared with only: twice forward, but not back, which is as much as once.
PASSES_BEFORE = {"dpo": 1.0, KTO: 0.5, CIT: 1.0}


@dataclass(frozen=True)
class Objective:
    """An objective of examples; the fields are those of the task."""

    kind: str
    beta: float
    cpo_alpha: float
    desirable_weight: float
    undesirable_weight: float
    contrast_weight: float
    temperature: float

    @property
    def has_reference(self) -> bool:
        """Whether answers are compared with what the base model thinks of them."""
        return self.kind in ("dpo", KTO)

    @property
    def learns_prompts(self) -> bool:
        """Whether the prompts of chosen answers are learned too, as TRL's ORPO does."""
        return self.kind == "orpo"

    @property
    def token_weight(self) -> float:
        """What the mean loss of the chosen answers' tokens counts for."""
        return {"cpo": self.cpo_alpha, "orpo": 1.0, CIT: 1.0}.get(self.kind, 0.0)


def objective_of(task: TaskConfig) -> Objective | None:
    """Return a task's objective of examples; None if it compares no answers."""
    if task.objective not in COMPARING:
        return None
    return Objective(
        task.objective, task.beta, task.cpo_alpha, task.desirable_weight, task.undesirable_weight,
        task.contrast_weight, task.temperature,
    )  # fmt: skip
