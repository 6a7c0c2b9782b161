"""Memory of a rank that trains the model itself, predicted from the model's shapes."""

from __future__ import annotations

from dataclasses import dataclass

from lobra.layout.layout import Layout
from lobra.layout.shapes import ModelShape
from lobra.profiler.accelerators import load_tables
from lobra.profiler.estimate_memory import Adapters, MemoryEstimate, stage_memories
from lobra.profiler.exchange import FLOAT_BYTES
from lobra.profiler.layer_memory import element_bytes


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of a rank.

    Attributes
    ----------
    weight_bytes, gradient_bytes, optimizer_bytes
        What is always held; the optimiser's on the rank's device.
    exchange_bytes
        What is held besides while replicas exchange or save, when there are no activations.
    activations
        What a micro-batch takes; its fixed part is that of the weights.
    factor
        What all numbers are larger by than in the estimate's precision.
    """

    weight_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    exchange_bytes: float
    activations: MemoryEstimate
    factor: int = 1

    def total_bytes(self, tokens: int) -> int:
        """Return the most that is held with micro-batches of so many tokens."""
        own = self.factor * (self.activations.total_bytes(tokens) - self.activations.fixed_bytes)
        always = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes
        return int(always + max(own, self.exchange_bytes))


def model_memory(
    shape: ModelShape,
    layout: Layout,
    num_replicas: int,
    precision: str,
    moment_bytes: float = 2 * FLOAT_BYTES,
    offload: bool = False,
    moments_made: int = 0,
) -> ModelMemory:
    """Return the memory of the rank that needs most.

    Parameters
    ----------
    shape
        The model's.
    layout, num_replicas
        Of the replicas, which are all alike.
    precision
        Of weights and activations; all else is fp32, in fp64 fp64.
    moment_bytes
        What the optimiser keeps of a weight beside the weight itself; in fp64 it is twice that.
    offload
        Whether that is in the host's memory.
    moments_made
        How many moments saving makes whole in fp32, all at once, of those kept in fewer bits.
    """
    factor = 2 if precision == "fp64" else 1
    stages = stage_memories(
        shape, layout.tp, layout.pp, Adapters(()), precision, load_tables().runtime(None),
        layout.memory,
    )  # fmt: skip
    found = [
        _of_stage(one, num_replicas, precision, moment_bytes, offload, factor, moments_made)
        for one in stages
    ]
    return max(found, key=lambda memory: memory.total_bytes(1))


def _of_stage(
    estimate: MemoryEstimate,
    num_replicas: int,
    precision: str,
    moment_bytes: float,
    offload: bool,
    factor: int,
    moments_made: int,
) -> ModelMemory:
    weight, wide = factor * element_bytes(precision), factor * FLOAT_BYTES
    elements = estimate.fixed_bytes / element_bytes(precision)
    share = elements / num_replicas
    # All replicas' rows of the gradient and this one's of the sum; then the new weights, gathered.
    reducing = wide * (elements + share) if num_replicas > 1 else 0
    gathering = weight * (elements + share) + wide * share
    saving = wide * (elements + (1 + moments_made) * share)  # one moment of all replicas
    return ModelMemory(
        weight * elements,
        wide * elements,
        0 if offload else (wide + factor * moment_bytes) * share,
        max(reducing, gathering, saving),
        estimate,
        factor,
    )
