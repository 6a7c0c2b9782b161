"""A layout: over how many GPUs a replica splits its layers, its stages and its sequences."""

from __future__ import annotations

from dataclasses import dataclass

from lobra.common.errors import ConfigError

ATTENTION = "attention"
ADAPTER_HIDDEN = "adapter hidden"  # x A^T of all adapters on an input
#: A layer keeps for the backward pass, by its replica's memory policy, its input and what its
#: products and attention gave, without those named here. The backward pass computes them again, and
#: always what is elementwise; never the last product, down_proj, whose output nothing needs.
#: All have inputs of the same width, so a byte of any product takes as long to compute again; of an
#: 8B layer gate and up are three fifths of what is kept. A byte of attention takes the longer the
#: longer sequences are.
COMPUTED_AGAIN: dict[str, frozenset[str]] = {
    "keep": frozenset(),
    "lean": frozenset({"gate_proj", "up_proj", "gate_up_proj"}),
    "full": frozenset(
        {
            *("q_proj", "k_proj", "v_proj", "qkv_proj", ATTENTION, "o_proj"),
            *("gate_proj", "up_proj", "gate_up_proj", ADAPTER_HIDDEN),
        }
    ),
}
MEMORY_POLICIES = tuple(COMPUTED_AGAIN)


@dataclass(frozen=True, order=True)
class Layout:
    """A parallel configuration ``<tp,pp>``, ordered by tp, then pp.

    Attributes
    ----------
    tp
        Tensor-parallel size: GPUs that share one layer.
    pp
        Pipeline size: number of stages the layers are divided into.
    cp
        Context-parallel size: GPUs that share one sequence.
    memory
        One of `MEMORY_POLICIES`.

    Raises
    ------
    ConfigError
        If a size is not a positive integer, the policy is unknown, or cp is more than 1.
    """

    tp: int
    pp: int
    cp: int = 1
    memory: str = "keep"

    def __post_init__(self) -> None:
        for name, value in (("tp", self.tp), ("pp", self.pp), ("cp", self.cp)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"layout: {name}: {value!r} is not a positive integer")
        if self.memory not in MEMORY_POLICIES:
            wanted = ", ".join(MEMORY_POLICIES)
            raise ConfigError(f"layout: memory: {self.memory!r} is not one of {wanted}")
        if self.cp > 1:
            raise ConfigError(
                f"layout: cp: {self.cp}: context parallelism is not built yet; want 1"
            )

    @property
    def num_gpus(self) -> int:
        """GPUs one replica of this layout occupies."""
        return self.tp * self.pp * self.cp

    def __str__(self) -> str:
        suffix = "" if self.memory == "keep" else f" {self.memory}"
        return f"<{self.tp},{self.pp}>{suffix}"
